"""Against the real hqq package, where it is installed."""

import itertools

import pytest
import torch
from safetensors.torch import load, save

from formats.weights import made, relative_error
from transformers_moe_offload.config.formats import GROUP_SIZES, NBITS, HqqFormat
from transformers_moe_offload.errors import CheckpointError, ConfigError
from transformers_moe_offload.formats.hqq import quantize
from transformers_moe_offload.kernels.packed import unpack
from transformers_moe_offload.kernels.reference import dequantize

from .interchange import from_hqq, to_hqq

FORMATS = list(itertools.product(NBITS, GROUP_SIZES))


@pytest.fixture(scope="module")
def hqq():
    return pytest.importorskip("hqq.core.quantize")


def quantized_by(hqq, weight, nbits=4, group_size=64, **options):
    settings = {"nbits": nbits, "group_size": group_size, "axis": 1, "optimize": False, "device": "cpu", **options}
    codes, meta = hqq.Quantizer.quantize(weight, **settings)
    return codes, meta | {"scale": meta["scale"].half(), "zero": meta["zero"].half(), "compute_dtype": torch.float32}


@pytest.mark.parametrize(("nbits", "group_size"), FORMATS)
@pytest.mark.parametrize("rows", [8, 6, 5])
def test_what_hqq_quantized_is_dequantized_to_the_same_weights(rows, nbits, group_size, hqq):
    codes, meta = quantized_by(hqq, made("gaussian", rows, 1024), nbits, group_size)
    ours = from_hqq(codes, meta)
    theirs = hqq.Quantizer.dequantize(codes, meta | {"scale": meta["scale"].float(), "zero": meta["zero"].float()})
    assert torch.equal(dequantize(ours, torch.float32), theirs)


@pytest.mark.parametrize(("nbits", "group_size"), FORMATS)
@pytest.mark.parametrize("meta_nbits", [16, 8])
@pytest.mark.parametrize("rows", [8, 6, 5])
def test_what_we_quantized_is_dequantized_by_hqq_to_the_same_weights(rows, meta_nbits, nbits, group_size, hqq):
    format = HqqFormat(nbits=nbits, group_size=group_size, meta_nbits=meta_nbits)
    ours = quantize(made("gaussian", rows, 1024), format)
    assert torch.equal(hqq.Quantizer.dequantize(*to_hqq(ours)), dequantize(ours, torch.float32))


@pytest.mark.parametrize("nbits", [8, 4, 2, 1])
def test_where_the_rows_divide_the_bytes_are_hqqs_own(nbits, hqq):
    codes, meta = quantized_by(hqq, made("gaussian", 16, 128), nbits)
    ours = from_hqq(codes, meta)
    assert ours.parts["codes"].data_ptr() == codes.data_ptr()
    assert to_hqq(ours)[0].data_ptr() == codes.data_ptr()


@pytest.mark.parametrize("rows", [16, 6, 5])
@pytest.mark.parametrize("nbits", NBITS)
def test_there_and_back_nothing_changes(nbits, rows):
    ours = quantize(made("student", rows, 512), HqqFormat(nbits=nbits, meta_nbits=16))
    back = from_hqq(*to_hqq(ours))
    assert back.packing == ours.packing
    assert all(torch.equal(back.parts[name], part) for name, part in ours.parts.items())


def test_other_dtypes_of_scales_are_rounded_to_float16(hqq):
    weight = made("gaussian")
    codes, meta = hqq.Quantizer.quantize(weight, nbits=4, group_size=64, axis=1, device="cpu")
    ours = from_hqq(codes, meta)
    assert torch.equal(ours.parts["scale"].view(-1, 1), meta["scale"].half())
    theirs = hqq.Quantizer.dequantize(codes, meta | {"compute_dtype": torch.float32})
    assert relative_error(dequantize(ours, torch.float32), theirs) < 1e-3


@pytest.mark.parametrize("nbits", NBITS)
def test_a_layer_saved_by_hqq_in_safetensors_is_read(nbits, hqq):
    linear = torch.nn.Linear(128, 40, bias=False)
    config = hqq.BaseQuantizeConfig(nbits=nbits, group_size=64, axis=1)
    layer = hqq.HQQLinear(linear, config, compute_dtype=torch.float16, device="cpu")
    state = {name: value.contiguous() for name, value in layer.state_dict().items()}
    read = load(save(state))
    ours = from_hqq(read["W_q"], read)
    assert ours.packing.nbits == nbits
    assert relative_error(dequantize(ours, torch.float32), layer.dequantize().float()) < 2e-3


@pytest.mark.parametrize(("nbits", "dtype"), [(4, torch.float16), (3, torch.float32), (2, torch.bfloat16)])
def test_codes_that_hqq_calls_floats_are_read_as_what_they_are(nbits, dtype, hqq):
    weight = made("gaussian", 40, 128)
    plain = from_hqq(*quantized_by(hqq, weight, nbits))
    disguised = from_hqq(*quantized_by(hqq, weight, nbits, view_as_float=True, compute_dtype=dtype))
    assert torch.equal(unpack(disguised), unpack(plain))


def valid():
    return to_hqq(quantize(made("gaussian", 8, 128), HqqFormat(meta_nbits=16)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"axis": 0}, "axis=0"),
        ({"nbits": 1.58}, "1.58 bits"),
        ({"nbits": 5}, "5 bits"),
        ({"nbits": 6}, "6 bits"),
        ({"nbits": True}, "True bits"),
        ({"group_size": 256}, "group_size=256"),
        ({"quant_scale": True}, "quant_scale=True"),
        ({"quant_zero": True}, "quant_zero=True"),
        ({"packing": "3bit_32"}, "'3bit_32' for 4 bits .* '4bit_u8'"),
        ({"packing": None}, "no 'packing'"),
        ({"group_size": None}, "no 'group_size'"),
        ({"shape": (8, 2, 64)}, r"shape \(8, 2, 64\)"),
        ({"shape": (16, 128)}, r"shape \(8, 64\); 4-bit codes of 16 x 128 weights .* \(16, 64\)"),
        ({"nbits": 2, "packing": "2bit_u8"}, r"2-bit codes of 8 x 128 .* \(4, 64\)"),
        ({"scale": None}, "scale of the expert is None; 16 groups"),
        ({"zero": torch.zeros(3, 1)}, r"zero of the expert is \(3, 1\); 16 groups"),
        ({"scale": torch.full((16, 1), float("inf"))}, "infinite"),
        ({"scale_q": torch.zeros(16)}, "scale_q"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(changed, message):
    codes, meta = valid()
    with pytest.raises(CheckpointError, match=message):
        from_hqq(codes, meta | changed, name="the expert")


def test_a_missing_entry_is_refused_by_name():
    codes, meta = valid()
    for key in ("nbits", "group_size", "shape", "axis", "packing"):
        with pytest.raises(CheckpointError, match=f"^the matrix has no '{key}' in its meta"):
            from_hqq(codes, {name: value for name, value in meta.items() if name != key})


def test_groups_that_do_not_divide_the_inputs_are_refused():
    codes, meta = valid()
    with pytest.raises(ConfigError, match="group_size=64 does not divide the 32 inputs"):
        from_hqq(codes, meta | {"shape": (32, 32)})


def test_text_in_a_file_is_never_evaluated():
    codes, meta = valid()
    text = torch.tensor(list(b"1/0"), dtype=torch.uint8)
    assert from_hqq(codes, meta | {"compute_dtype": text, "unpack_view_dtype": text}).packing.nbits == 4
    with pytest.raises(CheckpointError, match="packing='1/0'"):
        from_hqq(codes, meta | {"packing": text})


def test_groups_that_fill_no_whole_bytes_cannot_go_to_hqq():
    ours = quantize(made("gaussian", 3, 64), HqqFormat())
    with pytest.raises(ConfigError, match="2 groups in a byte and cannot hold the 3 groups of a matrix of 3 x 64"):
        to_hqq(ours)

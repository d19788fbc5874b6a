"""The package among the programs that people use it from: the command lines of the documentation, word for word."""

import json
import re
from pathlib import Path

import pytest

from users.pages import ROOT, all_blocks

pytestmark = pytest.mark.timeout(7200)

TRAIN = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers_moe_offload import OffloadConfig, training

path = "examples/models/tiny-moe"
model = AutoModelForCausalLM.from_pretrained(path, moe_offload=OffloadConfig(cache_budget="50%"))
training.set_trainable(model, "router")
ids = AutoTokenizer.from_pretrained(path)("SELECT name FROM users;", return_tensors="pt")["input_ids"][0]
arguments = TrainingArguments("run", max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
trainer = Trainer(model, arguments, train_dataset=[{"input_ids": ids, "labels": ids}] * 8)
trainer.train()
if trainer.is_world_process_zero():
    print("processes:", trainer.args.world_size)
"""


@pytest.fixture
def folder(tmp_path, clone) -> Path:
    (tmp_path / "examples").symlink_to(clone / "examples", target_is_directory=True)
    (tmp_path / "train.py").write_text(TRAIN)
    return tmp_path


BLOCKS = [block for block in all_blocks() if block.environment == "clients"]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_the_command_lines_of_a_page_run_as_they_stand_there(clients, folder, block):
    clients.expect("bash", "-e", "-c", block.text, cwd=folder)


def test_the_harness_gives_the_figures_of_the_plain_model(clients, folder):
    figures = []
    for options in ("", ",moe_offload=auto"):
        command = (
            "python -m transformers_moe_offload lm_eval run --model hf --include_path examples/evaluation "
            f"--tasks moe_offload_prose --model_args pretrained=examples/models/tiny-moe{options} --device cpu "
            f"--limit 6 --output_path results{len(figures)}.json"
        )
        clients.expect(*command.split(), cwd=folder)
        (file,) = folder.rglob(f"results{len(figures)}*.json")
        results = json.loads(file.read_text())["results"]["moe_offload_prose"]
        figures.append({name: value for name, value in results.items() if isinstance(value, float)})
    assert figures[0]
    assert figures[0] == figures[1]


def launchers() -> list[str]:
    """Lines of the fine-tuning guide that start several processes."""
    page = (ROOT / "docs" / "finetuning.md").read_text("utf-8")
    return re.findall(r"^- `((?:torchrun|accelerate launch) [^`]*train\.py)`", page, re.M)


@pytest.mark.parametrize("line", launchers())
def test_a_launcher_of_the_guide_trains_in_two_processes(clients, folder, line):
    if "--mpirun_hostfile" in line:
        pytest.skip("needs mpirun, which no package index has")
    printed = clients.expect("bash", "-e", "-c", line, cwd=folder)
    assert "processes: 2" in printed


def test_without_a_hostfile_accelerate_starts_one_process_on_a_cpu(clients, folder):
    """As the guide says; when this fails, accelerate has learnt to, and the guide can be shorter."""
    printed = clients.expect("bash", "-e", "-c", "accelerate launch --cpu --num_processes 2 train.py", cwd=folder)
    assert "processes: 1" in printed


def test_trl_trains_adapters_on_offloaded_experts(clients, folder):
    code = """
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
from transformers_moe_offload import OffloadConfig, training

path = "examples/models/tiny-moe"
model = AutoModelForCausalLM.from_pretrained(path, moe_offload=OffloadConfig(cache_budget="50%"))
data = Dataset.from_list([{"text": "SELECT name FROM users WHERE id = 1;"}] * 8)
arguments = SFTConfig("run", max_steps=2, report_to=[], use_cpu=True, save_strategy="no", max_length=32, bf16=False)
tokenizer = AutoTokenizer.from_pretrained(path)
peft_config = training.lora_config(model, r=2)
trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer, peft_config=peft_config)
trainer.train()
trainer.save_model("adapter")
"""
    clients.python(code, cwd=folder)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


SERVE = """
import json, os, socket, subprocess, sys, time, urllib.request
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
command = [sys.executable, "-m", "transformers_moe_offload", "transformers.cli.transformers", "serve",
           "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
server = subprocess.Popen(command)
request = {"model": os.path.abspath("low-bits"), "stream": False, "max_tokens": 4,
           "messages": [{"role": "user", "content": "int main("}]}
try:
    for attempt in range(600):
        try:
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            sent = urllib.request.Request(url, json.dumps(request).encode(), {"Content-Type": "application/json"})
            print(urllib.request.urlopen(sent, timeout=600).read().decode())
            break
        except urllib.error.HTTPError as error:
            sys.exit(error.read().decode())
        except urllib.error.URLError:
            assert server.poll() is None, "the server has ended"
            time.sleep(1)
finally:
    server.terminate()
    server.wait()
"""


def test_transformers_serves_a_low_bit_checkpoint(clients, folder):
    """The checkpoint says by itself that its experts stay on disk, so the server needs no option for it."""
    command = "moe-offload quantize examples/models/tiny-moe low-bits --experts 4x32"
    clients.expect(*command.split(), cwd=folder)
    settings = json.loads((folder / "low-bits" / "tokenizer_config.json").read_text())
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (folder / "low-bits" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    answer = json.loads(clients.python(SERVE, cwd=folder).splitlines()[-1])
    assert answer["choices"][0]["message"]["role"] == "assistant"

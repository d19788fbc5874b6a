"""A shared library for 64-bit ARM, called as ctypes calls libraries of this processor, on an emulated one.

Unicorn, which is QEMU's emulation of a processor, executes the library's instructions on this process's own memory, at
the same addresses: pointers to tensors and structures are passed as they are. What the library takes from the C library
is done by the one of this process. Calls run one at a time, on one emulated core, and threads of OpenMP one after
another. There is nothing else of an operating system: initialisers are not run, and functions that are not in
`_IMPORTED` cannot be called.
"""

import ctypes
import mmap
import struct
import threading
from pathlib import Path

PAGE = mmap.PAGESIZE
STACK_BYTES = 1 << 20
RETURN = struct.pack("<I", 0xD65F03C0)
"""The instruction `ret`."""
BELOW_THE_STACK = 1 << 12
"""Bytes left alone by a call from within a call."""

AT_HWCAP, ASIMD, ASIMDDP = 16, 1 << 1, 1 << 20

_pointer, _size, _int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_IMPORTED = {
    "malloc": (_pointer, _size),
    "free": (None, _pointer),
    "memcpy": (_pointer, _pointer, _pointer, _size),
    "memmove": (_pointer, _pointer, _pointer, _size),
    "memset": (_pointer, _pointer, _int, _size),
    "strcmp": (_int, _pointer, _pointer),
    "sched_yield": (_int,),
    "erff": (ctypes.c_float, ctypes.c_float),
    "expf": (ctypes.c_float, ctypes.c_float),
}
"""Functions of the C library -> types of the result and of the arguments."""


class Emulated:
    """A library whose functions are attributes, with `restype` and `argtypes`, as those of `ctypes.CDLL`.

    `has_dot_product`: whether the emulated processor has the dot product instructions (FEAT_DotProd): if not, it is a
    Cortex-A72, and executing one of them is an error.
    """

    def __init__(self, path, *, has_dot_product=True):
        import unicorn
        from unicorn import arm64_const as arm

        self._arm = arm
        self._lock = threading.RLock()
        self._uc = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._uc.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX if has_dot_product else arm.UC_CPU_ARM64_A72)
        self._uc.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floats and vectors may be used
        self._hwcap = ASIMD | (ASIMDDP if has_dot_product else 0)
        self._mapped = []
        self._failed = None
        self.instructions = None
        """How many have been executed, if it is set to a number."""
        self._memory = [mmap.mmap(-1, STACK_BYTES)]
        self._stack = _address(self._memory[0]) + STACK_BYTES
        self._handlers, self._stubs, self._symbols = {}, {}, {}
        self._first_stub = self._new_memory(PAGE)
        ctypes.memmove(self._first_stub, RETURN * (PAGE // 4), PAGE)
        self._end = self._stub("the end of a call", None)
        self._handed = {}
        for name, handler in (("GOMP_parallel", self._parallel), ("omp_get_max_threads", self._max_threads)):
            of_this_process = getattr(ctypes.CDLL(None), name, None)
            if of_this_process is not None:
                self._handed[ctypes.cast(of_this_process, _pointer).value] = self._stub(name, handler)
        self._load(Path(path).read_bytes())
        unmapped = unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED
        self._uc.hook_add(unmapped, self._map)
        for address in (self._first_stub, self._image):  # instructions of nothing else are executed
            self._map(None, None, address, None, None, None)
        self._uc.hook_add(unicorn.UC_HOOK_CODE, self._import, begin=self._first_stub, end=self._first_stub + PAGE)
        self._uc.hook_add(unicorn.UC_HOOK_BLOCK, self._count)

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._symbols:
            raise AttributeError(name)
        found = _Function(self, self._symbols[name])
        setattr(self, name, found)
        return found

    def _new_memory(self, nbytes):
        self._memory.append(mmap.mmap(-1, nbytes))
        return _address(self._memory[-1])

    def _stub(self, name, handler):
        """The address of an instruction that is intercepted."""
        if name not in self._stubs:
            self._stubs[name] = self._first_stub + 4 * len(self._stubs)
            self._handlers[self._stubs[name]] = handler
        return self._stubs[name]

    def _load(self, image):
        """Copy the library's segments to where they run, and write the addresses that it asks for."""
        sections = _sections(image)
        start, count = struct.unpack_from("<Q", image, 32)[0], struct.unpack_from("<H", image, 56)[0]
        headers = [struct.unpack_from("<IIQQQQQQ", image, start + 56 * number) for number in range(count)]
        segments = [header for header in headers if header[0] == 1]
        base = self._image = self._new_memory(
            max(place + nbytes for _, _, _, place, _, _, nbytes, _ in segments) + PAGE
        )
        for _, _, offset, place, _, in_file, _, _ in segments:
            ctypes.memmove(base + place, image[offset : offset + in_file], in_file)
        names = _content(image, sections[".dynstr"])
        symbols = list(struct.iter_unpack("<IBBHQQ", _content(image, sections[".dynsym"])))
        for at, _, _, section, value, _ in symbols:
            if section:
                self._symbols[_text(names, at)] = base + value
        for name in (".rela.dyn", ".rela.plt"):
            for place, info, addend in struct.iter_unpack("<QQq", _content(image, sections[name])):
                at, _, _, section, value, _ = symbols[info >> 32]
                kind = info & 0xFFFFFFFF
                assert kind in (257, 1025, 1026, 1027), f"relocation {kind} is not supported"
                if kind == 1027:  # relative
                    address = base + addend
                elif section:
                    address = base + value + addend
                else:
                    address = self._imported(_text(names, at))
                ctypes.c_uint64.from_address(base + place).value = address

    def _imported(self, name):
        if name in ("getauxval", "__getauxval"):
            return self._stub(
                name, lambda: self._set_result(_size, self._hwcap if self._argument(0) == AT_HWCAP else 0)
            )
        if name in _IMPORTED:
            result, *arguments = _IMPORTED[name]
            function = getattr(ctypes.CDLL("libm.so.6" if result is ctypes.c_float else None), name)
            function.restype, function.argtypes = result, arguments

            def handler():
                got = [
                    self._float(0) if one is ctypes.c_float else self._argument(i) for i, one in enumerate(arguments)
                ]
                self._set_result(result, function(*got))

            return self._stub(name, handler)

        def not_here():
            raise NotImplementedError(f"the emulator has no function {name}")

        return self._stub(name, not_here)

    def _parallel(self):
        """Do what a function does in each of some threads, one after another."""
        work, data, threads = (self._argument(number) for number in range(3))
        context = self._uc.context_save()
        stack = (self._uc.reg_read(self._arm.UC_ARM64_REG_SP) - BELOW_THE_STACK) // 16 * 16
        for _ in range(threads):
            self._run(work, [data], [], stack)
        self._uc.context_restore(context)

    def _max_threads(self):
        self._set_result(_int, ctypes.CDLL(None).omp_get_max_threads())

    def _argument(self, number):
        return self._uc.reg_read(self._arm.UC_ARM64_REG_X0 + number)

    def _float(self, number):
        return struct.unpack("<f", struct.pack("<I", self._uc.reg_read(self._arm.UC_ARM64_REG_S0 + number)))[0]

    def _set_result(self, kind, value):
        if kind is ctypes.c_float:
            bits = struct.unpack("<I", struct.pack("<f", value))[0]
            self._uc.reg_write(self._arm.UC_ARM64_REG_S0, bits)
        elif kind is not None:
            self._uc.reg_write(self._arm.UC_ARM64_REG_X0, (value or 0) % 2**64)

    def _map(self, uc, access, address, nbytes, value, data):
        """Let the library reach the memory of this process around an address, as far as it is not mapped yet."""
        for line in Path("/proc/self/maps").read_text().splitlines():
            start, stop = (int(one, 16) for one in line.split()[0].split("-"))
            if start <= address < stop:
                for begin, end in self._mapped:
                    if begin < stop and end > start:
                        start, stop = (end, stop) if end <= address else (start, begin)
                self._uc.mem_map_ptr(start, stop - start, 7, ctypes.c_void_p(start))
                self._mapped.append((start, stop))
                return True
        return False

    def _import(self, uc, address, nbytes, data):
        """The emulated processor is about to return from a function that is not in the library."""
        handler = self._handlers[address]
        if handler is None:
            uc.emu_stop()
            return
        try:
            handler()
        except Exception as error:  # raised again by `call`, for the emulator's own code is between
            self._failed = error
            uc.emu_stop()

    def _count(self, uc, address, nbytes, data):
        if self.instructions is not None:
            self.instructions += nbytes // 4

    def call(self, address, numbers, floats):
        """Call a function by its address with numbers and floats as arguments; returns the register of results."""
        with self._lock:
            self._run(address, [self._handed.get(number, number) for number in numbers], floats, self._stack)
            if self._failed is not None:
                error, self._failed = self._failed, None
                raise error
            return self._argument(0)

    def _run(self, address, numbers, floats, stack):
        """Run a function to its end; arguments beyond the eighth number are on the stack."""
        arm, uc = self._arm, self._uc
        on_stack = numbers[8:]
        stack -= 16 * (-(-len(on_stack) // 2))
        for place, value in enumerate(on_stack):
            ctypes.c_uint64.from_address(stack + 8 * place).value = value
        for place, value in enumerate(numbers[:8]):
            uc.reg_write(arm.UC_ARM64_REG_X0 + place, value)
        for place, value in enumerate(floats):
            uc.reg_write(arm.UC_ARM64_REG_D0 + place, struct.unpack("<Q", struct.pack("<d", value))[0])
        uc.reg_write(arm.UC_ARM64_REG_SP, stack)
        uc.reg_write(arm.UC_ARM64_REG_LR, self._end)
        uc.emu_start(address, self._end)


class _Function:
    """One function of the library."""

    def __init__(self, library, address):
        self._library, self._address = library, address
        self.restype, self.argtypes = ctypes.c_int, None

    def __call__(self, *arguments):
        kinds = self.argtypes or [None] * len(arguments)
        numbers, floats = [], []
        for kind, value in zip(kinds, arguments, strict=True):
            if kind is ctypes.c_double:
                floats.append(value)
            else:
                numbers.append(_number(value))
        found = self._library.call(self._address, numbers, floats)
        if self.restype is None:
            return None
        if self.restype is ctypes.c_char_p:
            return ctypes.string_at(found) if found else None
        return self.restype(found).value


def _number(value):
    """An argument as a register has it."""
    if value is None:
        return 0
    if isinstance(value, int):
        return int(value) % 2**64
    if isinstance(value, ctypes._SimpleCData):
        return _number(value.value)
    if isinstance(value, bytes):
        return ctypes.cast(ctypes.c_char_p(value), ctypes.c_void_p).value
    return ctypes.cast(value, ctypes.c_void_p).value or 0


def _address(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _sections(image):
    """Name -> offset and size of each section of an ELF file."""
    start = struct.unpack_from("<Q", image, 40)[0]
    size, count, names = struct.unpack_from("<HHH", image, 58)
    headers = [struct.unpack_from("<IIQQQQ", image, start + size * number) for number in range(count)]
    text = _content(image, headers[names][4:6])
    return {_text(text, header[0]): header[4:6] for header in headers}


def _content(image, section):
    offset, size = section
    return image[offset : offset + size]


def _text(names, start):
    return names[start : names.index(b"\0", start)].decode()

"""The burn-in of one GPU: copies, patterns in its memory, matrix products with known results.

A program in one plain file, which imports nothing of gpupt: the Python that has the frameworks is
often another than gpupt's, and older.  It takes the first framework that sees the card, and
writes each answer on its standard output as it comes, a line of JSON each; gpupt.edges.burnin
starts it, hears it and ends it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import resource
import signal
import statistics
import sys
import time
from typing import Any, Callable, Protocol, Sequence  # noqa: UP035 (of older Pythons too)

GIGA = 1e9
# Bytes of a word that is written and compared.
WORD = 4
# A number that is odd and far from all others: the words of no two pieces are the same then.
SPREAD = 0x9E3779B1
# Products of integers this small are exact in float32, and in TF32 as well; the sums of ±1 and 0
# stay below 256, up to which bfloat16 knows every integer.
LARGEST = 8
# How often a first product is tried until one is right, to compare the others with.
TRIES = 3
# Parts of the time that the copies and the memory may take; the products have the rest.
COPIES, PATTERNS = 0.15, 0.45


class NoDevice(Exception):
    """The framework is there, and sees no card."""


class Device(Protocol):
    """A card as a framework offers it; what is filled or copied may come back as a new array.

    Word i of a host's buffer is ``start + i``; word i of a pattern is ``base + step * i``, in the
    arithmetic of signed 32 bits.
    """

    name: str
    pinned: bool
    half: str
    errors: tuple[type[BaseException], ...]

    def model(self) -> str | None: ...
    def free(self) -> int: ...
    def exhausted(self, error: BaseException) -> bool: ...
    def host(self, words: int, start: int) -> Any: ...
    def words(self, host: Any) -> Any: ...
    def empty(self, words: int) -> Any: ...
    def upload(self, source: Any, target: Any) -> Any: ...
    def download(self, source: Any, target: Any) -> Any: ...
    def copy(self, source: Any, target: Any) -> Any: ...
    def fill(self, target: Any, base: int, step: int) -> Any: ...
    def equal_count(self, target: Any, base: int, step: int) -> int: ...
    def matrix(self, values: Any, kind: str) -> Any: ...
    def matmul(self, left: Any, right: Any) -> Any: ...
    def same_count(self, one: Any, other: Any) -> int: ...
    def numbers(self, matrix: Any) -> Any: ...
    def synchronize(self, result: Any) -> None: ...


class Arrays:
    """The machine's own memory and processor through numpy: no card, but the same questions."""

    name = "numpy"
    half = "float16"
    errors: tuple[type[BaseException], ...] = (MemoryError, RuntimeError)

    def __init__(self, module: str = "numpy") -> None:
        self.xp: Any = importlib.import_module(module)
        self.numpy: Any = importlib.import_module("numpy")
        self.pinned = False

    def model(self) -> str | None:
        return None

    def free(self) -> int:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def exhausted(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError)

    def host(self, words: int, start: int) -> Any:
        return self.numpy.arange(start, start + words, dtype="int32")

    def words(self, host: Any) -> Any:
        return host

    def empty(self, words: int) -> Any:
        return self.xp.empty(words, dtype="int32")

    def upload(self, source: Any, target: Any) -> Any:
        target[:] = source
        return target

    def download(self, source: Any, target: Any) -> Any:
        target[:] = source
        return target

    def copy(self, source: Any, target: Any) -> Any:
        target[:] = source
        return target

    def pattern(self, words: int, base: int, step: int) -> Any:
        """The words of a pattern; additions of whole arrays wrap around."""
        made = self.xp.arange(words, dtype="int32")
        made *= step
        made += self.numpy.int32(base)
        return made

    def fill(self, target: Any, base: int, step: int) -> Any:
        target[:] = self.pattern(len(target), base, step) if step else base
        return target

    def equal_count(self, target: Any, base: int, step: int) -> int:
        wanted = self.pattern(len(target), base, step) if step else base
        return int(self.xp.count_nonzero(target == wanted))

    def matrix(self, values: Any, kind: str) -> Any:
        return self.xp.asarray(values.astype(kind))

    def matmul(self, left: Any, right: Any) -> Any:
        return left @ right

    def same_count(self, one: Any, other: Any) -> int:
        return int(self.xp.count_nonzero(one == other))

    def numbers(self, matrix: Any) -> Any:
        return matrix.astype("float64")

    def synchronize(self, result: Any) -> None:
        pass


class Cupy(Arrays):
    """CuPy, which speaks as numpy does."""

    name = "cupy"

    def __init__(self) -> None:
        super().__init__("cupy")
        if not self.xp.cuda.is_available():
            raise NoDevice("sees no CUDA device")
        self.pinned = True
        self.extra = importlib.import_module("cupyx")

    def model(self) -> str | None:
        said = self.xp.cuda.runtime.getDeviceProperties(0)["name"]
        return said.decode() if isinstance(said, bytes) else str(said)

    def free(self) -> int:
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def host(self, words: int, start: int) -> Any:
        made = self.extra.empty_pinned(words, dtype="int32")
        made[:] = self.numpy.arange(start, start + words, dtype="int32")
        return made

    def upload(self, source: Any, target: Any) -> Any:
        target.set(source)
        return target

    def download(self, source: Any, target: Any) -> Any:
        return source.get(out=target)

    def numbers(self, matrix: Any) -> Any:
        return matrix.get().astype("float64")

    def synchronize(self, result: Any) -> None:
        self.xp.cuda.Device().synchronize()


class Torch:
    """PyTorch."""

    name = "torch"
    half = "bfloat16"
    errors: tuple[type[BaseException], ...] = (RuntimeError, MemoryError)

    def __init__(self, device: str = "cuda") -> None:
        self.torch: Any = importlib.import_module("torch")
        self.numpy: Any = importlib.import_module("numpy")
        self.cuda = device == "cuda"
        if self.cuda and not self.torch.cuda.is_available():
            raise NoDevice("sees no CUDA device")
        self.device = self.torch.device(device)
        self.pinned = self.cuda
        # Otherwise partial sums may be rounded before they are added.
        self.torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False

    def model(self) -> str | None:
        return str(self.torch.cuda.get_device_name(0)) if self.cuda else None

    def free(self) -> int:
        if not self.cuda:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(self.torch.cuda.mem_get_info()[0])

    def exhausted(self, error: BaseException) -> bool:
        return isinstance(error, (MemoryError, self.torch.cuda.OutOfMemoryError))

    def host(self, words: int, start: int) -> Any:
        made = self.torch.empty(words, dtype=self.torch.int32, pin_memory=self.pinned)
        return self.torch.arange(start, start + words, dtype=self.torch.int32, out=made)

    def words(self, host: Any) -> Any:
        return host.numpy()

    def empty(self, words: int) -> Any:
        return self.torch.empty(words, dtype=self.torch.int32, device=self.device)

    def upload(self, source: Any, target: Any) -> Any:
        return target.copy_(source, non_blocking=True)

    def download(self, source: Any, target: Any) -> Any:
        return target.copy_(source, non_blocking=True)

    def copy(self, source: Any, target: Any) -> Any:
        return target.copy_(source)

    def pattern(self, target: Any, base: int, step: int) -> Any:
        """Make the words of a pattern in that array; its additions wrap around."""
        self.torch.arange(len(target), dtype=self.torch.int32, device=self.device, out=target)
        return target.mul_(step).add_(base)

    def fill(self, target: Any, base: int, step: int) -> Any:
        return self.pattern(target, base, step) if step else target.fill_(base)

    def equal_count(self, target: Any, base: int, step: int) -> int:
        wanted = self.pattern(self.empty(len(target)), base, step) if step else base
        return int(self.torch.count_nonzero(target == wanted))

    def matrix(self, values: Any, kind: str) -> Any:
        return self.torch.from_numpy(values).to(self.device, getattr(self.torch, kind))

    def matmul(self, left: Any, right: Any) -> Any:
        return self.torch.mm(left, right)

    def same_count(self, one: Any, other: Any) -> int:
        return int(self.torch.count_nonzero(one == other))

    def numbers(self, matrix: Any) -> Any:
        return matrix.cpu().double().numpy()

    def synchronize(self, result: Any) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()


class Jax:
    """JAX, whose arrays never change: each filling is a new array beside the old."""

    name = "jax"
    half = "bfloat16"
    errors: tuple[type[BaseException], ...] = (RuntimeError, MemoryError)

    def __init__(self, platform: str = "gpu") -> None:
        # https://docs.jax.dev/en/latest/gpu_memory_allocation.html
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".95")
        self.jax: Any = importlib.import_module("jax")
        self.jnp: Any = importlib.import_module("jax.numpy")
        self.numpy: Any = importlib.import_module("numpy")
        try:
            self.device: Any = self.jax.devices(platform)[0]
        except RuntimeError as error:
            raise NoDevice(f"sees no CUDA device ({first_line(error)})") from None
        self.there = self.jax.sharding.SingleDeviceSharding(self.device)
        self.here: Any = None
        kinds = {memory.kind for memory in self.device.addressable_memories()}
        if "pinned_host" in kinds:
            self.here = self.jax.sharding.SingleDeviceSharding(
                self.device, memory_kind="pinned_host"
            )
        self.pinned = self.here is not None
        self.made: Any = self.jax.jit(self.pattern, static_argnums=0)
        self.counted: Any = self.jax.jit(self.count)
        self.product: Any = self.jax.jit(self.multiply)

    def pattern(self, words: int, base: Any, step: Any) -> Any:
        """The words of a pattern."""
        return base + step * self.jax.lax.iota("int32", words)

    def count(self, target: Any, base: Any, step: Any) -> Any:
        """How many words are those of the pattern."""
        return self.jnp.count_nonzero(target == self.pattern(len(target), base, step))

    def multiply(self, left: Any, right: Any) -> Any:
        """The product of two matrices, in float32."""
        return self.jnp.matmul(left, right, preferred_element_type="float32")

    def model(self) -> str | None:
        return str(self.device.device_kind)

    def free(self) -> int:
        said = self.device.memory_stats()
        if not said:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return int(said["bytes_limit"]) - int(said["bytes_in_use"])

    def exhausted(self, error: BaseException) -> bool:
        return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)

    def host(self, words: int, start: int) -> Any:
        made = self.numpy.arange(start, start + words, dtype="int32")
        return made if self.here is None else self.jax.device_put(made, self.here)

    def words(self, host: Any) -> Any:
        return self.numpy.asarray(host)

    def empty(self, words: int) -> Any:
        return self.jax.block_until_ready(self.fill_new(words, 0, 0))

    def fill_new(self, words: int, base: int, step: int) -> Any:
        """A new array on the card with that pattern."""
        with self.jax.default_device(self.device):
            return self.made(words, self.numpy.int32(base), self.numpy.int32(step))

    def upload(self, source: Any, target: Any) -> Any:
        return self.jax.device_put(source, self.there)

    def download(self, source: Any, target: Any) -> Any:
        if self.here is None:
            return self.numpy.array(source)
        return self.jax.device_put(source, self.here)

    def copy(self, source: Any, target: Any) -> Any:
        return self.jnp.array(source, copy=True)

    def fill(self, target: Any, base: int, step: int) -> Any:
        return self.fill_new(len(target), base, step)

    def equal_count(self, target: Any, base: int, step: int) -> int:
        return int(self.counted(target, self.numpy.int32(base), self.numpy.int32(step)))

    def matrix(self, values: Any, kind: str) -> Any:
        return self.jax.device_put(self.jnp.asarray(values, dtype=kind), self.there)

    def matmul(self, left: Any, right: Any) -> Any:
        return self.product(left, right)

    def same_count(self, one: Any, other: Any) -> int:
        return int(self.jnp.count_nonzero(one == other))

    def numbers(self, matrix: Any) -> Any:
        return self.numpy.asarray(matrix).astype("float64")

    def synchronize(self, result: Any) -> None:
        self.jax.block_until_ready(result)


class Tensorflow:
    """TensorFlow, in words of 64 bits: it keeps those of 32 bits in the host's memory."""

    name = "tensorflow"
    half = "bfloat16"

    def __init__(self, device: str = "GPU") -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
        self.tf: Any = importlib.import_module("tensorflow")
        self.numpy: Any = importlib.import_module("numpy")
        if not self.tf.config.list_physical_devices(device):
            raise NoDevice("sees no CUDA device")
        self.place = f"/{device}:0"
        self.card = device == "GPU"
        self.pinned = False
        # What TensorFlow raises is no RuntimeError.
        self.errors: tuple[type[BaseException], ...] = (
            self.tf.errors.OpError, RuntimeError, MemoryError,
        )  # fmt: skip

    def model(self) -> str | None:
        cards = self.tf.config.list_physical_devices("GPU")
        if not cards:
            return None
        said = self.tf.config.experimental.get_device_details(cards[0]).get("device_name")
        return str(said) if said else None

    def free(self) -> int:
        if not self.card:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return memory_of_first_card()

    def exhausted(self, error: BaseException) -> bool:
        return isinstance(error, (MemoryError, self.tf.errors.ResourceExhaustedError))

    def host(self, words: int, start: int) -> Any:
        return self.numpy.arange(start, start + words // 2, dtype="int64")

    def words(self, host: Any) -> Any:
        return host.view("int32")

    def empty(self, words: int) -> Any:
        with self.tf.device(self.place):
            return self.tf.zeros([words // 2], dtype="int64")

    def upload(self, source: Any, target: Any) -> Any:
        with self.tf.device(self.place):
            # A constant may share numpy's memory; the identity of one on a card does not.
            return self.tf.identity(self.tf.constant(source))

    def download(self, source: Any, target: Any) -> Any:
        return source.numpy().copy()

    def copy(self, source: Any, target: Any) -> Any:
        with self.tf.device(self.place):
            return source + 0

    def fill(self, target: Any, base: int, step: int) -> Any:
        return self.pattern(len(target), base, step)

    def pattern(self, words: int, base: int, step: int) -> Any:
        """The words of a pattern, two by two: the upper half of each is its lower half."""
        with self.tf.device(self.place):
            if not step:
                both = (base & 0xFFFFFFFF) * 0x100000001
                return self.tf.fill([words], self.tf.constant(signed(both, 64), "int64"))
            numbers = self.tf.range(words, dtype="int64")
            return numbers * step + self.tf.constant(base, "int64")

    def equal_count(self, target: Any, base: int, step: int) -> int:
        with self.tf.device(self.place):
            wanted = self.pattern(len(target), base, step)
            # Each of these words is two of those that are counted.
            return 2 * int(self.tf.math.count_nonzero(self.tf.equal(target, wanted)))

    def matrix(self, values: Any, kind: str) -> Any:
        with self.tf.device(self.place):
            return self.tf.cast(self.tf.constant(values.astype("float32")), kind)

    def matmul(self, left: Any, right: Any) -> Any:
        with self.tf.device(self.place):
            return self.tf.linalg.matmul(left, right)

    def same_count(self, one: Any, other: Any) -> int:
        with self.tf.device(self.place):
            return int(self.tf.math.count_nonzero(self.tf.equal(one, other)))

    def numbers(self, matrix: Any) -> Any:
        return self.tf.cast(matrix, "float32").numpy().astype("float64")

    def synchronize(self, result: Any) -> None:
        self.tf.test.experimental.sync_devices()


FRAMEWORKS: dict[str, Callable[[], Device]] = {
    "torch": Torch,
    "jax": Jax,
    "cupy": Cupy,
    "tensorflow": Tensorflow,
}
# No card: taken only where it is asked for.
WITHOUT_CARD: dict[str, Callable[[], Device]] = {"numpy": Arrays}


def memory_of_first_card() -> int:
    """The memory of the first card that CUDA shows, in bytes; 0 where that cannot be asked."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    card, size = ctypes.c_int(), ctypes.c_size_t()
    if cuda.cuInit(0) or cuda.cuDeviceGet(ctypes.byref(card), 0):
        return 0
    return 0 if cuda.cuDeviceTotalMem_v2(ctypes.byref(size), card) else size.value


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    said = str(error).strip().splitlines()
    return (said[0] if said else type(error).__name__)[:300]


def signed(number: int, bits: int = 32) -> int:
    """The signed number with those lower bits."""
    number &= (1 << bits) - 1
    return number - (1 << bits) if number >> (bits - 1) else number


class Voice:
    """Sends the messages, a line of JSON each."""

    def __init__(self, file: int) -> None:
        self.file = file

    def send(self, kind: str, **more: Any) -> None:
        """Send a message of that kind."""
        line = json.dumps({"kind": kind, **more}) + "\n"
        os.write(self.file, line.encode())

    def say(self, **answers: Any) -> None:
        """Send answers by their names."""
        for name, value in answers.items():
            self.send("answer", field=name, value=value)


def choose(names: Sequence[str], voice: Voice) -> Device | None:
    """The first framework of these that imports and sees a card; why the others do not is said."""
    every = {**FRAMEWORKS, **WITHOUT_CARD}
    for name in names:
        try:
            return every[name]()
        except NoDevice as error:
            why = str(error)
        except ModuleNotFoundError as error:
            why = "is not installed" if error.name == name else first_line(error)
        # What an installation that is broken raises: libraries missing, versions that disagree.
        except (ImportError, OSError, RuntimeError, AttributeError, ValueError) as error:
            why = f"does not start: {first_line(error)}"
        voice.send("skipped", framework=name, why=why)
    return None


class Burn:
    """A burn-in of one device; ``clock`` tells seconds."""

    def __init__(
        self,
        device: Device,
        voice: Voice,
        options: argparse.Namespace,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.device, self.voice, self.options, self.clock = device, voice, options, clock
        self.numpy: Any = importlib.import_module("numpy")

    def run(self) -> None:
        """All stages; what goes wrong in one does not keep the next from its turn."""
        begun = self.clock()
        seconds = self.options.seconds
        for stage, work, share in (
            ("bandwidth", self.bandwidth, COPIES),
            ("memory", self.memory, PATTERNS),
            ("matrix", self.matrix, 1.0),
        ):
            self.voice.send("stage", stage=stage)
            try:
                work(begun + share * seconds)
            except self.device.errors as error:
                self.voice.send("failed", stage=stage, why=first_line(error))
            else:
                self.voice.send("done", stage=stage)

    def bandwidth(self, until: float) -> None:
        """Copies between the host and the device, and on the device."""
        device, size = self.device, self.options.copy
        words = size // WORD
        # Not the same words in both, or a copy that brings nothing back would not be seen.
        source, back = device.host(words, 0), device.host(words, 1)
        there, other = device.empty(words), device.empty(words)
        there, seconds = self.timed(lambda: device.upload(source, there), until)
        self.voice.say(host_to_device=rate(size, min(seconds)))
        self.voice.say(host_to_device_median=rate(size, statistics.median(seconds)))
        other, seconds = self.timed(lambda: device.copy(there, other), until)
        # Each byte is read and written.
        self.voice.say(device=rate(2 * size, min(seconds)))
        back, seconds = self.timed(lambda: device.download(other, back), until)
        self.voice.say(device_to_host=rate(size, min(seconds)))
        self.voice.say(device_to_host_median=rate(size, statistics.median(seconds)))
        wrong = self.numpy.count_nonzero(device.words(back) != device.words(source))
        self.voice.say(copy_errors=int(wrong))

    def timed(self, work: Callable[[], Any], until: float) -> tuple[Any, list[float]]:
        """The result of what is done several times, and the seconds each took; at least once."""
        device, seconds = self.device, []
        # The first sets up what the others use.
        device.synchronize(work())
        for _ in range(self.options.rounds):
            begun = self.clock()
            result = work()
            device.synchronize(result)
            seconds.append(self.clock() - begun)
            if self.clock() > until:
                break
        return result, seconds

    def memory(self, until: float) -> None:
        """Patterns in most of the free memory: all is written, then all is read.

        What is read was written long before, so that it comes from the memory and no cache.
        """
        device, words = self.device, self.options.chunk // WORD
        pieces = self.claim(words)
        if not pieces:
            self.voice.say(memory_tested=0)
            return
        errors = 0
        for patterns, (base, step) in enumerate(walk(), start=1):
            for number in range(len(pieces)):
                start = signed(base + step * number * SPREAD)
                pieces[number] = device.fill(pieces[number], start, step)
            for number in range(len(pieces)):
                start = signed(base + step * number * SPREAD)
                errors += words - device.equal_count(pieces[number], start, step)
            self.voice.say(
                memory_tested=len(pieces) * words * WORD,
                memory_patterns=patterns,
                memory_errors=errors,
            )
            if self.clock() > until:
                break

    def claim(self, words: int) -> list[Any]:
        """Most of the free memory, in pieces; less, where others are quicker to take it."""
        wanted = int(self.device.free() * self.options.fraction)
        if self.options.most:
            wanted = min(wanted, self.options.most)
        pieces: list[Any] = []
        try:
            for _ in range(wanted // (words * WORD)):
                pieces.append(self.device.empty(words))
        except self.device.errors as error:
            if not self.device.exhausted(error):
                raise
            # What is worked with needs room too.
            del pieces[len(pieces) * 9 // 10 :]
        return pieces

    def matrix(self, until: float) -> None:
        """Products of matrices of small integers, which are exact in whatever order is added."""
        kinds = [Products(self.device, kind, self.options.size) for kind in self.kinds()]
        while kinds:
            for each in kinds:
                each.repeat(self.options.batch, self.clock)
            self.voice.say(
                products=sum(each.done for each in kinds),
                wrong_products=sum(each.wrong for each in kinds),
                tflops=kinds[0].best,
            )
            if len(kinds) > 1:
                self.voice.say(tflops_half=kinds[1].best)
            if self.clock() > until:
                break

    def kinds(self) -> tuple[str, ...]:
        """The kinds of numbers that are multiplied."""
        return ("float32", self.device.half) if self.device.half else ("float32",)


class Products:
    """The product of two matrices, again and again."""

    def __init__(self, device: Device, kind: str, size: int) -> None:
        self.device, self.kind, self.size = device, kind, size
        self.numpy: Any = importlib.import_module("numpy")
        draw = self.numpy.random.default_rng(size)
        self.left, self.right = self.draw(draw), self.draw(draw)
        self.operands = (device.matrix(self.left, kind), device.matrix(self.right, kind))
        self.right_one: Any = None
        self.done = self.wrong = 0
        self.best: float | None = None

    def draw(self, draw: Any) -> Any:
        """A matrix of integers that are small enough."""
        shape = (self.size, self.size)
        if self.kind == "float32":
            return draw.integers(-LARGEST, LARGEST, size=shape, endpoint=True, dtype="int8")
        # Half of them 0: the sums then stay within 8 deviations of 0 up to a size of 4096.
        values = self.numpy.array([-1, 0, 0, 1], dtype="int8")
        return values[draw.integers(0, 4, size=shape)]

    def repeat(self, times: int, clock: Callable[[], float]) -> None:
        """Multiply so often, and compare each result, bit by bit, with one that was proven."""
        if not self.find_right_one():
            return
        begun = clock()
        results = [self.device.matmul(*self.operands) for _ in range(times)]
        self.device.synchronize(results)
        seconds = max(clock() - begun, 1e-9)
        speed = 2 * self.size**3 * times / seconds / 1e12
        self.best = max(speed, self.best or 0.0)
        for result in results:
            self.count(self.device.same_count(self.right_one, result) == self.size**2)

    def find_right_one(self) -> bool:
        """Have a result that the host has proven right; each wrong one before it counts."""
        for _ in range(TRIES):
            if self.right_one is not None:
                return True
            result = self.device.matmul(*self.operands)
            right = self.proven(self.device.numbers(result))
            self.count(right)
            if right:
                self.right_one = result
        return self.right_one is not None

    def count(self, right: bool) -> None:
        """Take a product into account."""
        self.done += 1
        self.wrong += not right

    def proven(self, result: Any) -> bool:
        """Is it the product?  Freivalds: multiplied with vectors, one wrong element shows."""
        generator = random.Random(self.size)
        columns = [
            [generator.choice((-3, -2, -1, 1, 2, 3)) for _ in range(2)] for _ in range(self.size)
        ]
        vectors = self.numpy.array(columns, dtype="float64")
        left, right = self.left.astype("float64"), self.right.astype("float64")
        return bool(self.numpy.array_equal(result @ vectors, left @ (right @ vectors)))


def rate(size: int, seconds: float) -> float:
    """The rate in GB/s of a copy of that many bytes."""
    return round(size / max(seconds, 1e-9) / GIGA, 3)


def walk() -> list[tuple[int, int]]:
    """The patterns of the memory test: addresses in themselves first, then constants.

    The complement of each follows, so that every bit is seen as 0 and as 1 early.
    """
    constants = [0x55555555, 0x00000000, *(1 << bit for bit in range(32))]
    pairs = [(signed(each), signed(~each)) for each in constants]
    return [(0, 1), (-1, -1), *((each, 0) for pair in pairs for each in pair)]


def read_options(words: Sequence[str]) -> argparse.Namespace:
    """What the program is asked to do."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--deadline", type=float, default=180.0)
    parser.add_argument("--framework", choices=[*FRAMEWORKS, *WITHOUT_CARD])
    parser.add_argument("--turn", action="store_true", help="wait for a line before the load")
    parser.add_argument("--copy", type=int, default=256 << 20, help="bytes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--fraction", type=float, default=0.8, help="of the free memory")
    parser.add_argument("--most", type=int, default=0, help="bytes of memory to test")
    parser.add_argument("--chunk", type=int, default=256 << 20, help="bytes")
    parser.add_argument("--size", type=int, default=4096, help="of the matrices")
    parser.add_argument("--batch", type=int, default=16, help="products between comparisons")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Burn the card in that CUDA shows first."""
    options = read_options(words)
    # What frameworks print goes with the errors, not between the answers.
    voice = Voice(os.dup(1))
    os.dup2(2, 1)
    # The core of a process with a card's memory mapped would fill the disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    device = choose([options.framework] if options.framework else list(FRAMEWORKS), voice)
    if device is None:
        voice.send("none")
        return 0
    voice.send("begun", framework=device.name, name=device.model(), pinned=device.pinned)
    # No line: whoever started this is gone.
    if options.turn and not sys.stdin.readline():
        return 1
    # Should gpupt itself be killed: nobody else ends a load that hangs.
    signal.setitimer(signal.ITIMER_REAL, options.deadline)
    Burn(device, voice, options).run()
    voice.send("ended")
    # Not the frameworks' destructors: they may hang, and the kernel releases what is held.
    os._exit(0)


if __name__ == "__main__":
    # Beside this file lie modules of gpupt, which no framework is to import by mistake.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [each for each in sys.path if os.path.abspath(each or ".") != here]
    sys.exit(main(sys.argv[1:]))

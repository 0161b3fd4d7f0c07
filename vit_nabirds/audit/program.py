"""What a compiled program holds and sends, read from its text and from XLA's account of its memory."""

import dataclasses
import math
import re

BYTES = {"f32": 4, "bf16": 2, "f16": 2, "f64": 8, "pred": 1}
BYTES |= {f"{sign}{8 * size}": size for sign in "su" for size in (1, 2, 4, 8)}
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"
ARRAY = r"\b(\w+)\[([\d,]*)\]"
NO_KERNEL = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "while")
PRODUCT = re.compile(r'custom_call_target="__cu(blas|dnn)|"kind":"__triton_gemm"| dot\(')
TO_HOST = re.compile(r"xla_ffi_python|xla_python_|SendToHost|RecvFromHost|\binfeed|\boutfeed|S\(5\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str  # 'all-reduce', ...
    dtype: str  # as XLA writes it: 'f32', 'bf16', 'u32', ...
    bytes: int  # of its result, on one device
    asynchronous: bool
    products: int  # matrix products and attentions that are started while it is under way


def size_of(types: str) -> int:
    """Bytes of all arrays in a piece of XLA's text, like '(f32[8,4]{1,0}, u32[])'."""
    arrays = ((dtype, map(int, filter(None, sides.split(",")))) for dtype, sides in re.findall(ARRAY, types))
    return sum(BYTES.get(dtype, 0) * math.prod(sides) for dtype, sides in arrays)


def computations(text: str) -> dict[str, list[str]]:
    """Name -> lines of each computation of a compiled program; that of the program itself is ENTRY."""
    found, lines = {}, []
    for line in text.splitlines():
        if begins := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            lines = found["ENTRY" if begins[1] else begins[2]] = []
        lines.append(line)
    return found


def loops(lines: list[str]) -> list[tuple[str, int]]:
    """The computation that each loop repeats, and how often; once where XLA does not know."""
    found = [(line, re.search(r" while\(.*body=%?([\w.-]+)", line)) for line in lines]
    turns = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
    return [(body[1], int((turns.search(line) or [0, 1])[1])) for line, body in found if body]


def collectives(text: str) -> list[Collective]:
    """All of a compiled program, in the order in which they start; what a loop repeats, as often."""
    found = computations(text)
    repeated = {body: turns for lines in found.values() for body, turns in loops(lines)}
    return [c for name, lines in found.items() for c in _collectives(lines) * repeated.get(name, 1)]


def _collectives(lines: list[str]) -> list[Collective]:
    found = []
    for number, line in enumerate(lines):
        match = re.match(rf"\s*(?:ROOT )?%?(\S+) = (.+?) ({COLLECTIVES})(-start)?\(", line)
        if not match:
            continue
        name, types, kind, start = match.groups()
        products = 0
        if start:  # whose own type may list what goes in, too
            done = re.compile(rf" = (.+?) {kind}-done\(.*%?{re.escape(name)}\b")
            for later in lines[number + 1 :]:
                if end := done.search(later):
                    types = end[1]
                    break
                products += bool(PRODUCT.search(later))
        dtypes = re.findall(r"\b(\w+)\[", types)
        found.append(Collective(kind, max(set(dtypes), key=dtypes.count), size_of(types), bool(start), products))
    return found


def fused_attentions(text: str) -> tuple[int, int]:
    """How often cuDNN's attention is called: forwards, backwards."""
    return text.count('"__cudnn$fmhaSoftmax"'), text.count('"__cudnn$fmhaSoftmaxBackward"')


def host_traffic(text: str) -> list[str]:
    """Lines of a compiled program that call the host or copy to its memory."""
    return [line.strip() for line in text.splitlines() if TO_HOST.search(line)]


def memory_traffic(text: str) -> int:
    """Bytes that the kernels of a compiled program read and write, if none of them is found in a cache."""
    return _traffic(computations(text), "ENTRY")


def _traffic(found: dict[str, list[str]], name: str) -> int:
    sizes, total = {}, sum(turns * _traffic(found, body) for body, turns in loops(found[name]))
    for line in found[name]:
        if match := re.match(r"\s*(?:ROOT )?%(\S+) = (.+?) ([\w-]+)\((.*?)\)", line):
            result, types, kind, operands = match.groups()
            sizes[result] = size_of(types)
            if kind not in NO_KERNEL and "-done" not in kind:
                total += sizes[result] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.-]+)", operands))
    return total

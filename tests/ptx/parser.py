"""PTX text to lists of instructions. A directive or a form that is not known is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from .formats import WIDTH, PtxError

WORD = re.compile(r"[%$\w]+")
WRITES_NOTHING = ("st", "bra", "brx", "bar", "barrier")


@dataclass(slots=True)
class Instruction:
    """One instruction, taken apart."""

    op: str  # "ld", "cp.async", "wgmma", ...
    mods: list[str]  # the dotted parts that are not types
    types: list[str]
    args: list[str]
    line: str  # its text and source line, for messages
    guard: str | None = None  # predicate register
    negated: bool = False
    used: int | None = None  # bytes of a load that are used at all (.pragma "used_bytes_mask")
    flow: tuple[list[str], list[str]] | None = None  # see `operands`

    def has(self, *mods: str) -> str | None:
        """The first of the given modifiers that the instruction carries."""
        for mod in mods:
            if mod in self.mods:
                return mod
        return None

    def operands(self, registers: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """The registers that it reads and those that it writes; found once."""
        if self.flow is None:
            writes = bool(self.args) and self.args[0][0] != "[" and self.op not in WRITES_NOTHING
            parts = self.args[2 if self.op == "shfl" else writes :], self.args[:writes]
            found = ([x for arg in part for x in WORD.findall(arg) if x in registers] for part in parts)
            self.flow = next(found), next(found)
        return self.flow


@dataclass
class Parameter:
    """A kernel parameter: a number, or bytes passed by value."""

    name: str
    type: str
    size: int  # in bytes
    count: int | None = None  # elements, where it is an array


@dataclass
class Kernel:
    """One .entry of the text."""

    name: str
    params: list[Parameter]
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # name: bytes, of all variables it uses
    local: dict[str, int] = field(default_factory=dict)
    threads: tuple[int, ...] | None = None  # .reqntid
    cluster: tuple[int, ...] | None = None  # .reqnctapercluster
    explicit_cluster: bool = False  # launches must give a cluster shape, or the kernel has one
    branch_targets: dict[str, list[str]] = field(default_factory=dict)  # name of the list: labels
    known: bool = False  # every instruction has been found to be known


TWO_WORDS = {"cp.async", "cp.async.bulk", "cp.async.bulk.tensor", "fence.proxy", "tensormap.replace"}
TWO_WORDS.add("barrier.cluster")
LINE_DIRECTIVES = re.compile(r"(?m)^\s*\.(version|target|address_size|file)\b[^\n]*$")
VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(shared|global|const|local)\s+(?:\.attribute\([^)]*\)\s*)?"
    r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$%]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?",
    re.S,
)
KERNEL_DIRECTIVES = re.compile(
    r"\s*\.(?:(reqntid|reqnctapercluster)\s+([\d, ]+)|(explicitcluster)"
    r"|(?:maxntid|minnctapersm|maxnreg|maxclusterrank|pragma)\s+[^.]*)"
)


def split_operands(text: str) -> list[str]:
    """Split at commas that are not inside brackets."""
    out, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += character
    return [*out, current.strip()] if current.strip() else out


def vector(operand: str) -> list[str]:
    """The elements of "{a, b}", or the operand alone."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


class Module:
    """All kernels and variables of one PTX text.

    later: a kernel is parsed when `kernel` is first asked for it, as few of a large text may be launched.
    """

    def __init__(self, text: str, later: bool = False) -> None:
        self.kernels: dict[str, Kernel] = {}
        self._texts: dict[str, tuple[str, str]] = {}  # head and body of each kernel
        self.data: dict[str, tuple[str, int, list[str]]] = {}  # global variables: type, elements, values
        self.dynamic: list[str] = []  # shared memory whose size the launch gives
        self.shared: dict[str, int] = {}
        text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
        target = re.search(r"(?m)^\s*\.target\s+(\w+)", text)
        self.target = target.group(1) if target else ""
        self.files = dict(re.findall(r'(?m)^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', text))
        text = LINE_DIRECTIVES.sub("", text)
        at = 0
        while match := re.compile(r"[^;{]*[;{]").search(text, at):
            head, at = match.group(0)[:-1].strip(), match.end()
            if match.group(0).endswith(";"):
                self._declaration(head)
            elif "=" in head:
                end = text.index("}", at)
                self._declaration(head + text[at:end].strip())
                at = text.index(";", end) + 1
            else:
                end = _closing_brace(text, at)
                if re.search(r"\.entry\b", head):
                    name = re.search(r"\.entry\s+([\w$]*)", head)[1]  # type: ignore[index]
                    self._texts[name] = head, text[at : end - 1]
                elif not head.startswith(".section"):
                    what = "device functions (.func) are" if ".func" in head else f"{head.split()[0]} is"
                    raise PtxError(f"{what} not supported: {' '.join(head.split())[:100]}")
                at = end
        if rest := text[at:].strip():
            raise PtxError(f"unsupported text at the end: {rest[:80]}")
        if not later:
            for name in self._texts:
                self.kernel(name)

    @property
    def names(self) -> list[str]:
        """Of all kernels."""
        return list(self._texts)

    def kernel(self, name: str) -> Kernel:
        if name not in self.kernels:
            self._kernel(*self._texts[name])
        return self.kernels[name]

    def _declaration(self, text: str) -> None:
        if not text or re.match(r"\.extern\s+\.func\b", text) or re.match(r"\.pragma\b", text):
            return  # a call of the external function is refused where it stands
        match = VARIABLE.fullmatch(text)
        if not match or match.group(3) not in WIDTH:
            raise PtxError(f"unsupported directive: {' '.join(text.split())[:100]}")
        space, _, kind, name, shape, values = match.groups()
        sizes = [int(n or 0) for n in re.findall(r"\[(\d*)\]", shape)]
        count = 1
        for n in sizes:
            count *= n
        if space == "shared":
            if ".extern" in text:
                self.dynamic.append(name)
            else:
                self.shared[name] = count * WIDTH[kind] // 8
        elif space in ("global", "const"):
            numbers = split_operands(values or "")
            self.data[name] = kind, max(count, len(numbers)), numbers
        else:
            raise PtxError(f"unsupported directive: {' '.join(text.split())[:100]}")

    def _kernel(self, head: str, body: str) -> None:
        match = re.fullmatch(
            r"(?:\.visible\s+|\.weak\s+)*\.entry\s+([\w$]+)\s*(?:\((.*?)\))?(.*)", head, re.S
        )
        if not match:
            raise PtxError(f"unsupported kernel header: {head[:100]}")
        name, params, rest = match.group(1), match.group(2) or "", match.group(3)
        kernel = Kernel(name, [_parameter(p) for p in params.split(",") if p.strip()])
        for directive in KERNEL_DIRECTIVES.finditer(rest):
            kernel.explicit_cluster |= directive.group(3) is not None
            if directive.group(1):
                sizes = tuple(int(n) for n in directive.group(2).split(","))
                if directive.group(1) == "reqntid":
                    kernel.threads = sizes
                else:
                    kernel.cluster = (*sizes, 1, 1)[:3]
        if unknown := KERNEL_DIRECTIVES.sub("", rest).strip():
            raise PtxError(f"{name}: unsupported directive: {unknown[:80]}")
        self._body(kernel, body)
        words = set(re.findall(r"[\w$]+", body))
        kernel.shared.update((x, size) for x, size in self.shared.items() if x in words)
        self.kernels[name] = kernel

    def _location(self, directive: str) -> str:
        """The words "[file:line]", followed by the place of the call for an inlined function."""
        place = r"(\d+) (\d+)"
        found = re.findall(rf"(?:\.loc|inlined_at) {place}", directive)
        words = [f"{self.files.get(number, '?')}:{line}" for number, line in found]
        return f" [{' in '.join(words)}]"

    def _body(self, kernel: Kernel, body: str) -> None:
        statements, renames = _statements(body)
        location, used, last_label = "", None, ""
        for statement, scopes in statements:
            for scope in scopes:
                if scope in renames:
                    statement = renames[scope].sub(rf"\g<0>__{scope}", statement)
            while label := re.match(r"([$%\w]+)\s*:(?!:)\s*", statement):
                last_label = label.group(1)
                kernel.labels[last_label] = len(kernel.code)
                statement = statement[label.end() :]
            if not statement:
                continue
            if statement[0] != ".":
                kernel.code.append(_instruction(statement, location, used))
                used = None
            elif statement.startswith(".branchtargets"):
                kernel.branch_targets[last_label] = split_operands(statement.removeprefix(".branchtargets"))
            elif statement.startswith(".loc "):
                location = self._location(statement)
            elif match := re.match(r'\.pragma "used_bytes_mask (0x[0-9a-f]+|\d+)"', statement):
                used = int(match.group(1), 0)
            else:
                _local_declaration(kernel, statement)


def _closing_brace(text: str, start: int) -> int:
    """The place after the brace that closes what was opened before `start`."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match.group(0) == "{" else -1
        if depth == 0:
            return match.end()
    raise PtxError("a brace is never closed")


def _parameter(text: str) -> Parameter:
    match = re.search(
        r"\.param\b.*?\.(?!align|ptr|global)([usbf]\d+)\b.*?([\w$]+)\s*(?:\[(\d+)\])?\s*$", text
    )
    if not match:
        raise PtxError(f"unsupported parameter: {text.strip()}")
    kind, name, count = match.groups()
    return Parameter(name, kind, WIDTH[kind] // 8 * int(count or 1), int(count) if count else None)


def _statements(body: str) -> tuple[list[tuple[str, tuple[int, ...]]], dict[int, re.Pattern[str]]]:
    """(statement, scopes it is in), and for every scope a pattern of the names declared in it."""
    body = re.sub(r"(?m)^\s*(\.loc\s.*)$", r";\1;", body)
    out: list[tuple[str, tuple[int, ...]]] = []
    names: dict[int, set[str]] = {}
    scopes: list[int] = []
    count, current = 0, ""
    for piece in re.findall(r"[{};]|[^{};]+", body):
        if piece == "{" and not current.strip():
            count += 1
            scopes.append(count)
        elif piece == "}" and not current.strip():
            scopes.pop()
        elif piece == ";":
            statement, current = " ".join(current.split()), ""
            if scopes:
                statement = _spell_out(statement)
                names.setdefault(scopes[-1], set()).update(_declared(statement))
            out.append((statement, tuple(scopes)))
        else:
            current += piece
            if scopes and (label := re.match(r"\s*([$%\w]+)\s*:(?!:)", current)):
                names.setdefault(scopes[-1], set()).add(label.group(1))
    if current.strip():
        out.append((" ".join(current.split()), ()))
    patterns = {
        s: re.compile(r"(?<![\w$%.])(?:" + "|".join(map(re.escape, sorted(n))) + r")(?![\w$])")
        for s, n in names.items()
        if n
    }
    return out, patterns


def _spell_out(statement: str) -> str:
    """ ".reg .b32 r<2>" as ".reg .b32 r0, r1"."""
    if not statement.startswith(".reg"):
        return statement
    return re.sub(
        r"([%\w$]+)<(\d+)>",
        lambda m: ", ".join(f"{m.group(1)}{i}" for i in range(int(m.group(2)))),
        statement,
    )


def _declared(statement: str) -> list[str]:
    match = re.match(r"\.reg\s*\.\w+\s+(.*)", statement)
    return [name.strip() for name in match.group(1).split(",")] if match else []


def _local_declaration(kernel: Kernel, statement: str) -> None:
    if match := re.match(r"\.reg\s*\.(\w+)\s+(.*)", statement):
        if match.group(1) not in WIDTH:
            raise PtxError(f"unsupported type of a register: {statement}")
        for name in _declared(_spell_out(statement)):
            kernel.registers[name] = match.group(1)
    elif (match := VARIABLE.fullmatch(statement)) and match.group(1) in ("shared", "local"):
        space, _, kind, name, shape, values = match.groups()
        count = 1
        for n in re.findall(r"\[(\d+)\]", shape):
            count *= int(n)
        if values or kind not in WIDTH:
            raise PtxError(f"unsupported directive: {statement[:100]}")
        (kernel.shared if space == "shared" else kernel.local)[name] = count * WIDTH[kind] // 8
    elif not re.match(r'\.pragma "(nounroll"|"|enable_smem_spilling)', statement):
        raise PtxError(f"unsupported directive: {statement[:100]}")


def _instruction(statement: str, location: str, used: int | None) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
    if not match:
        raise PtxError(f"not an instruction: {statement[:100]}{location}")
    op, *parts = match.group(3).split(".")
    while parts and f"{op}.{parts[0]}" in TWO_WORDS:
        op = f"{op}.{parts.pop(0)}"
    return Instruction(
        op,
        [p for p in parts if p not in WIDTH],
        [p for p in parts if p in WIDTH],
        split_operands(match.group(4)),
        statement[:160] + location,
        match.group(2),
        match.group(1) == "!",
        used,
    )


# Few, as a large module takes tens of megabytes: the kernels of one operation and its gradients.
@lru_cache(maxsize=24)
def parse(text: str, later: bool = False) -> Module:
    """The module of a PTX text, parsed once; `later` as `Module` has it."""
    return Module(text, later)

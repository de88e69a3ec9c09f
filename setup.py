"""Build of the native module `crossvit_kernels._native`; everything else is in pyproject.toml.

What can be built is built: C++ where a compiler is found, CUDA where nvcc is found too, neither on Windows.
What was left out, why, and the compiler's first error line are stored beside the module in
`_build_report.json`, because pip hides the output of a build that succeeds; `python -m crossvit_kernels`
shows it. No torch is needed: csrc includes none of its headers.

Environment: CXX and CXXFLAGS (compiler, more flags for it), CROSSVIT_CUDA (0 leaves CUDA out, 1 fails
without it), TORCH_CUDA_ARCH_LIST (numbers as torch reads them: "8.0;9.0a+PTX"), CUDA_HOME (toolkit), MAX_JOBS
(parallel compilers).
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent.resolve() / "csrc"
REPORT = "_build_report.json"
# A100 and its kin and H100/H200 as machine code; newer GPUs compile the PTX of the latter when they load it.
DEFAULT_CUDA_TARGETS = ["sm_80", "sm_90a", "compute_90"]
# Architectures whose `a` form unlocks instructions that the kernels use (wgmma, tcgen05).
SPECIFIC_ARCHITECTURES = {"90", "100"}
AVX512 = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
# Every cpu.cpp is compiled once for each of these that the compiler knows (csrc/common/cpu_isa.h chooses).
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}

NEWEST = ("avx512bf16", "amx")


class BuildError(Exception):
    """A compiler or ninja failed; the text is its whole output."""


def run(command: list[str], **kwargs) -> str:
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", **kwargs
        )
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(done.stdout)
    return done.stdout


def first_error_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = (line for line in lines if re.search(r"\b(fatal|error|undefined|cannot find)\b", line, re.I))
    return next(errors, lines[-1] if lines else "no output")


def find_cxx() -> list[str] | None:
    """The C++ compiler as command words, or None. A CXX that does not exist is not replaced by another."""
    if os.environ.get("CXX"):
        words = shlex.split(os.environ["CXX"])
        return words if words and shutil.which(words[0]) else None
    candidates = [sysconfig.get_config_var("CXX") or "", "c++", "g++", "clang++"]
    for words in map(shlex.split, candidates):
        if words and shutil.which(words[0]):
            return words[:1]
    return None


def compiles(cxx: list[str], flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        try:
            run([*cxx, *flags, str(source), "-o", str(Path(folder, "probe"))])
        except BuildError:
            return False
    return True


def openmp_flags(cxx: list[str]) -> list[str]:
    """Flags for OpenMP, whose pool torch shares; without it (macOS) the module runs on one thread."""
    return ["-fopenmp"] if compiles(cxx, ["-fopenmp"]) else []


def instruction_sets(cxx: list[str]) -> dict[str, list[str]]:
    """All of INSTRUCTION_SETS, without the newest two for an old compiler; the baseline on other machines."""
    sets = INSTRUCTION_SETS
    for count in (len(sets), len(sets) - len(NEWEST)):
        known = dict(list(sets.items())[:count])
        if all(compiles(cxx, flags) for flags in known.values()):
            return known
    return {"baseline": []}


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        found = shutil.which("nvcc", path=str(Path(home, "bin")))
    else:
        found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return Path(found) if found else None


def visible_gpu_targets() -> list[str]:
    """Machine code for the GPUs that nvidia-smi shows; empty where there is none."""
    try:
        output = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], timeout=30)
    except (BuildError, subprocess.TimeoutExpired):
        return []
    capabilities = set(re.findall(r"^(\d+)\.(\d)\s*$", output, re.M))
    return sorted(sm_name(major + minor) for major, minor in capabilities)


def sm_name(number: str) -> str:
    return f"sm_{number}a" if number in SPECIFIC_ARCHITECTURES else f"sm_{number}"


def cuda_targets() -> list[str]:
    """nvcc code names: TORCH_CUDA_ARCH_LIST, else the visible GPUs, else the defaults."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not wanted:
        return visible_gpu_targets() or DEFAULT_CUDA_TARGETS
    targets = []
    for item in wanted:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not match:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST must list capabilities such as '8.0;9.0a+PTX', got {item!r}"
            )
        number, suffix = match[1] + match[2], match[3]
        targets.append(f"sm_{number}{suffix}" if suffix else sm_name(number))
        if match[4]:
            targets.append(f"compute_{number}{suffix}")
    return targets


def gencode_flags(targets: list[str]) -> list[str]:
    return [f"-gencode=arch={t.replace('sm_', 'compute_')},code={t}" for t in targets]


def nvcc_release(nvcc: Path) -> str:
    match = re.search(r"release (\S+),", run([str(nvcc), "--version"]))
    return match[1] if match else "unknown"


def static_cudart(nvcc: Path) -> list[str]:
    """Link flags for the static CUDA runtime of this nvcc's toolkit."""
    dry_run = run([str(nvcc), "-dryrun", "-c", os.devnull, "-x", "cu"])
    match = re.search(r"LIBRARIES=\s*(.*)", dry_run)
    return [*shlex.split(match[1] if match else ""), "-lcudart_static", "-lpthread", "-ldl", "-lrt"]


def ninja_file(rules: dict[str, str], objects: dict[Path, tuple[str, Path]], output: Path, link: str) -> str:
    def quoted(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = []
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {command}"]
    lines += ["rule link", f"  command = {link}"]
    lines += [f"build {quoted(obj)}: {rule} {quoted(src)}" for obj, (rule, src) in objects.items()]
    lines += [f"build {quoted(output)}: link {' '.join(map(quoted, objects))}", ""]
    return "\n".join(lines)


def compile_module(
    output: Path, cxx: list[str], openmp: list[str], nvcc: Path | None, targets: list[str]
) -> None:
    """Compile csrc in a folder of its own and move the finished module into place in one step, so that an
    interrupted or a concurrent build leaves nothing behind that another one could pick up."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError(f"error: {error} (a build requirement, see pyproject.toml)") from error
    includes = [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()]
    common = ["-O3", "-std=c++17", *(f"-I{path}" for path in dict.fromkeys(includes))]
    hidden = ["-fPIC", "-fvisibility=hidden"]
    isas = instruction_sets(cxx)
    defines = [*(["-DCROSSVIT_CUDA"] if nvcc else []), *(["-DCROSSVIT_X86_ISAS"] if len(isas) > 1 else [])]
    defines += ["-DCROSSVIT_X86_NEWEST"] if NEWEST[0] in isas else []
    more = shlex.split(os.environ.get("CXXFLAGS", ""))
    # Products may be contracted with sums, which is the compilers' default; nothing else is relaxed.
    cpp = [*cxx, *common, *hidden, *defines, "-Wall", "-Wno-psabi", "-fno-math-errno", *openmp, *more]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]

    with tempfile.TemporaryDirectory(prefix="crossvit-build-") as folder:
        rules = {"cpp": shlex.join(cpp) + " -c $in -o $out"}
        sources = [("cpp", path) for path in sorted(CSRC.rglob("*.cpp")) if path.name != "cpu.cpp"]
        for isa, flags in isas.items():
            rules[isa] = shlex.join([*cpp, *flags, f"-DCROSSVIT_ISA={isa}"]) + " -c $in -o $out"
            sources += [(isa, path) for path in sorted(CSRC.rglob("cpu.cpp"))]
        libraries = []
        if nvcc:
            cuda = [str(nvcc), *common, *defines, f"-Xcompiler={','.join(hidden)}", "-lineinfo"]
            # The last word that names a program: CXX may begin with a launcher such as ccache.
            host = [word for word in cxx if not word.startswith("-")][-1]
            cuda += [f"-ccbin={host}", *gencode_flags(targets)]
            rules["cuda"] = shlex.join(cuda) + " -c $in -o $out"
            sources += [("cuda", path) for path in sorted(CSRC.rglob("*.cu"))]
            libraries = static_cudart(nvcc)
        objects = {
            Path(folder, str(path.relative_to(CSRC)).replace(os.sep, ".") + f".{rule}.o"): (rule, path)
            for rule, path in sources
        }
        module = Path(folder, output.name)
        link = f"{shlex.join([*cxx, *shared])} $in -o $out {shlex.join([*openmp, *libraries, *more])}"
        Path(folder, "build.ninja").write_text(ninja_file(rules, objects, module, link))
        jobs = os.environ.get("MAX_JOBS")
        run([sys.executable, "-m", "ninja", "-C", folder, *(["-j", jobs] if jobs else [])])
        output.parent.mkdir(parents=True, exist_ok=True)
        moving = output.with_name(f"{output.name}.{os.getpid()}")
        shutil.copy2(module, moving)
        os.replace(moving, output)


def build(output: Path) -> dict[str, object]:
    """Build what this machine can and return the report; raises SystemExit only where CUDA was demanded."""
    demanded = os.environ.get("CROSSVIT_CUDA")
    if demanded not in (None, "", "0", "1"):
        raise SystemExit(f"CROSSVIT_CUDA must be 0, 1 or unset, got {demanded!r}")
    report: dict[str, object] = {
        "python": sys.implementation.cache_tag,
        "platform": sysconfig.get_platform(),
        "cpu": None,
        "cuda": None,
    }

    def left_out(part: str, reason: str) -> None:
        report[f"{part}_left_out"] = reason
        if part == "cuda" and demanded == "1":
            raise SystemExit(f"CROSSVIT_CUDA=1 demands the CUDA kernels, but {reason}")

    cxx = find_cxx()
    if platform.system() == "Windows" or cxx is None:
        reason = "the native module is not built on Windows"
        if platform.system() != "Windows":
            reason = f"no C++ compiler was found (CXX={os.environ.get('CXX', 'unset')})"
        left_out("cpu", reason)
        left_out("cuda", reason)
        return report

    nvcc = find_nvcc()
    if demanded == "0":
        nvcc = None
        left_out("cuda", "CROSSVIT_CUDA=0 was set")
    elif nvcc is None:
        left_out("cuda", "nvcc was not found (on PATH, in CUDA_HOME/bin or /usr/local/cuda/bin)")
    openmp = openmp_flags(cxx)
    if nvcc:
        try:
            targets, release = cuda_targets(), nvcc_release(nvcc)
            compile_module(output, cxx, openmp, nvcc, targets)
            report["cuda"] = {"nvcc": release, "targets": targets}
        except BuildError as error:
            left_out("cuda", f"it did not compile: {first_error_line(str(error))}")
    try:
        if report["cuda"] is None:
            compile_module(output, cxx, openmp, None, [])
        report["cpu"] = {"compiler": run([*cxx, "--version"]).splitlines()[0], "openmp": bool(openmp)}
    except BuildError as error:
        left_out("cpu", f"it did not compile: {first_error_line(str(error))}")
    return report


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.unlink(missing_ok=True)
        report = build(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.with_name(REPORT).write_text(json.dumps(report, indent=2) + "\n")

    def copy_extensions_to_source(self) -> None:
        """Editable installs: the report lies beside the module in the source tree too."""
        super().copy_extensions_to_source()
        built = Path(self.build_lib, "crossvit_kernels", REPORT)
        package = Path(self.get_finalized_command("build_py").get_package_dir("crossvit_kernels"))
        shutil.copy2(built, package / REPORT)
        for ext in self.extensions:
            module = Path(self.get_ext_filename(ext.name)).name
            if not Path(self.build_lib, "crossvit_kernels", module).exists():
                (package / module).unlink(missing_ok=True)


# A build folder of its own: nothing stale is packed, and builds side by side do not meet.
build_base = tempfile.mkdtemp(prefix="crossvit-build-")
atexit.register(shutil.rmtree, build_base, ignore_errors=True)
setup(
    ext_modules=[Extension("crossvit_kernels._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative},
    options={"build": {"build_base": build_base}},
)

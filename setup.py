"""Builds medspark/_C with CMake; everything declarative lives in pyproject.toml.

Environment: MEDSPARK_NATIVE and MEDSPARK_CUDA (AUTO, ON or OFF), MEDSPARK_CUDA_ARCHS, MAX_JOBS.
torch is neither imported nor required here: the compiled core knows nothing of it.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHS = "80-real;90a-real;100-real;120"


def switch(name: str) -> str:
    """The AUTO/ON/OFF value of an environment variable (AUTO where it is not set)."""
    value = os.environ.get(name, "").upper() or "AUTO"
    if value not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"{name}={os.environ[name]!r} is not one of AUTO, ON, OFF")
    return value


def find_tool(*names: str) -> str | None:
    """First of the programs found beside this Python (a venv not activated) or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def find_compiler() -> str | None:
    """The C++ compiler CMake would start with; $CXX wins, as it does in CMake."""
    if chosen := os.environ.get("CXX"):
        return find_tool(shlex.split(chosen)[0])
    return find_tool("c++", "g++", "clang++", "cl")


def find_nvcc() -> str | None:
    """A CUDA compiler; whether this machine has a GPU plays no part."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    in_homes = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    return os.environ.get("CUDACXX") or find_tool("nvcc", *in_homes)


def native_wanted() -> bool:
    """Whether to build the extension; only a missing compiler may turn it off by itself."""
    choice = switch("MEDSPARK_NATIVE")
    if choice == "OFF":
        print("medspark: MEDSPARK_NATIVE=OFF, native kernels skipped: pure torch", file=sys.stderr)
        return False
    if find_compiler():
        return True
    problem = f"medspark: no C++ compiler found ({os.environ.get('CXX') or 'c++, g++, clang++'})"
    if choice == "ON":
        raise SystemExit(f"{problem}, but MEDSPARK_NATIVE=ON; install one, for example g++")
    print(f"{problem}: native kernels skipped, pure torch", file=sys.stderr)
    return False


def run(command: list[str], env: dict[str, str]) -> None:
    """Run one step of the build; its failure is final and its own messages explain it."""
    if subprocess.call(command, env=env) != 0:
        hint = "see the messages above; MEDSPARK_NATIVE=OFF installs without native kernels"
        raise SystemExit(f"medspark: {Path(command[0]).name} failed, {hint}")


class CMakeBuild(build_ext):
    """Configures with CMake, compiles with Ninja where found, copies the module into place."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext`; any error of CMake or the compiler is fatal."""
        cmake, ninja, nvcc = find_tool("cmake"), find_tool("ninja"), find_nvcc()
        if not cmake:
            raise SystemExit("medspark: cmake not found; run: pip install cmake ninja")
        import pybind11  # a build requirement: absent only where isolation is switched off

        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "MEDSPARK_VERSION": self.distribution.get_version(),
            "MEDSPARK_CUDA": switch("MEDSPARK_CUDA"),
            "CMAKE_CUDA_ARCHITECTURES": os.environ.get("MEDSPARK_CUDA_ARCHS") or DEFAULT_ARCHS,
        }
        if ninja:
            options["CMAKE_MAKE_PROGRAM"] = ninja
        build = Path(self.build_temp).resolve()
        command = [cmake, "-S", str(ROOT), "-B", str(build)]
        command += ["-G", "Ninja"] if ninja else []
        command += [f"-D{key}={value}" for key, value in options.items()]
        env = {**os.environ, **({"CUDACXX": nvcc} if nvcc else {})}
        configure(command, env, build)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        run([cmake, "--build", str(build), "--parallel", jobs], env)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build / target.name), str(target))


def configure(command: list[str], env: dict[str, str], build: Path) -> None:
    """Run CMake's configure step, from scratch where anything it was told has changed.

    A cache that names another Python or a vanished isolated environment would otherwise be
    obeyed; an unchanged one keeps its object files, so a rebuild compiles only what was edited.
    """
    told = {name: env.get(name) for name in ("CXX", "CUDACXX", "CXXFLAGS", "CUDAFLAGS", "LDFLAGS")}
    stamp, record = build / "configured-with.json", json.dumps([command, told])
    fresh = not stamp.exists() or stamp.read_text() != record
    stamp.unlink(missing_ok=True)
    run([*command, "--fresh"] if fresh else command, env)
    stamp.write_text(record)


class CleanBuildPy(build_py):
    """Forgets what an earlier build left, so that deleted modules and configs leave the wheel."""

    def run(self) -> None:
        """Copy the Python files and the configs."""
        for path in Path(self.build_lib, "medspark").rglob("*"):
            if path.suffix in (".py", ".yaml"):
                path.unlink()
        super().run()


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["medspark", "medspark.*"]), "medspark.configs"],
        package_dir={"medspark.configs": "configs"},
        package_data={"medspark.configs": ["*.yaml", "**/*.yaml"]},
        ext_modules=[Extension("medspark._C", sources=[])] if native_wanted() else [],
        cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
    )

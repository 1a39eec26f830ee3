"""Work that is spread over processes, Ray and Slurm: what is done, what fails, what goes on."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from decoding.errors import DecodingError
from experiments.lab import spread
from experiments.lab.spread import Stage, Workers, run, submit


@dataclass(frozen=True)
class Tasks:
    """Each writes a file, or does worse."""

    folder: Path
    name: str = "a"
    worse: str = ""

    def path(self, task):
        return self.folder / f"{self.name}{task}"

    def __call__(self, task):
        if task == 1 and self.worse == "fails":
            raise DecodingError("the text is blank")
        if task == 1 and self.worse == "lacks":
            raise ModuleNotFoundError("no module", name="pyarrow")
        if task == 1 and self.worse == "memory":
            raise MemoryError
        if task == 1 and self.worse == "breaks":
            raise KeyError("a fault of ours")
        once = self.folder / "killed"
        if task == 1 and (self.worse == "is always killed" or (self.worse == "is killed" and not once.exists())):
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        told = [str(os.getpid()), os.environ.get("CUDA_VISIBLE_DEVICES", "")]
        if self.name != "a" and not (self.folder / "a0").exists():
            raise DecodingError("too early")
        self.path(task).write_text(" ".join(told))

    def stage(self, count=4):
        return Stage(self.name, count, self, lambda task: self.path(task).exists())


def done(folder, name="a"):
    return sorted(path.name for path in folder.glob(f"{name}[0-9]"))


LOCAL = Workers("local", 2)


def test_stages_follow_each_other_and_what_is_done_stays(tmp_path):
    (tmp_path / "a2").write_text("done before")
    run([Tasks(tmp_path).stage(), Tasks(tmp_path, "b").stage()], LOCAL)
    assert done(tmp_path) == ["a0", "a1", "a2", "a3"] and done(tmp_path, "b") == ["b0", "b1", "b2", "b3"]
    assert (tmp_path / "a2").read_text() == "done before"
    pids = {path.read_text().split()[0] for path in tmp_path.glob("[ab]?")} - {"done"}
    assert str(os.getpid()) not in pids and len(pids) <= 2


@pytest.mark.parametrize(
    ("worse", "error", "says"),
    [
        ("fails", DecodingError, "task 1 of stage a failed: the text is blank"),
        ("lacks", DecodingError, "a worker lacks pyarrow: install the same packages"),
        ("memory", DecodingError, "a worker ran out of memory at stage a"),
        ("breaks", KeyError, "a fault of ours"),
        ("is always killed", DecodingError, "a worker was killed at stage a, time and again"),
    ],
)
def test_what_fails_is_said_and_the_same_again_goes_on(tmp_path, worse, error, says):
    alone = Workers("local", 1)
    with pytest.raises(error, match=says):
        run([Tasks(tmp_path, worse=worse).stage(), Tasks(tmp_path, "b").stage()], alone)
    assert "a0" in done(tmp_path) and "a1" not in done(tmp_path) and not done(tmp_path, "b")
    run([Tasks(tmp_path).stage(), Tasks(tmp_path, "b").stage()], alone)
    assert len(done(tmp_path)) == len(done(tmp_path, "b")) == 4


def test_a_worker_that_is_killed_is_replaced(tmp_path):
    run([Tasks(tmp_path, worse="is killed").stage()], LOCAL)
    assert len(done(tmp_path)) == 4 and (tmp_path / "killed").exists()


def test_workers_share_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    run([Tasks(tmp_path).stage(6)], Workers("local", 2, gpus=2))
    assert {path.read_text().split()[1] for path in tmp_path.glob("a?")} <= {"4,5", "6,7"}
    with pytest.raises(DecodingError, match="3 workers with 2 GPUs each need 6, and there are 4"):
        run([Tasks(tmp_path, "b").stage()], Workers("local", 3, gpus=2))


def test_other_versions_are_refused(tmp_path):
    versions = spread.versions() | {"torch": "0.1"}
    with pytest.raises(DecodingError, match="a worker has torch .*, and the run was begun with 0.1: install the same"):
        spread._do(Tasks(tmp_path), 0, versions)
    assert not done(tmp_path)


SLEEPER = """
import sys, time
from pathlib import Path
from experiments.lab.spread import Stage, Workers, run
from tests.experiments.lab.test_spread import Sleep
if __name__ == "__main__":
    run([Stage("s", 2, Sleep(Path(sys.argv[1])), lambda _: False)], Workers("local", 2))
"""


@dataclass(frozen=True)
class Sleep:
    folder: Path

    def __call__(self, task):
        (self.folder / str(os.getpid())).touch()
        time.sleep(600)


def _is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
def test_workers_end_with_a_command_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SLEEPER)
    (pids := tmp_path / "pids").mkdir()
    root = str(Path(__file__).parents[3])
    command = subprocess.Popen([sys.executable, tmp_path / "script.py", pids], env={**os.environ, "PYTHONPATH": root})
    until = time.monotonic() + 120
    while len(list(pids.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    workers = [int(path.name) for path in pids.iterdir()]
    assert len(workers) == 2 and all(map(_is_alive, workers))
    command.kill()
    command.wait()
    while any(map(_is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(_is_alive, workers))


SBATCH = """#!{python}
# Runs each job of an array at once, as Slurm would do later.
import os, re, subprocess, sys
from pathlib import Path
log, script = Path({log!r}), Path(sys.argv[-1]).read_text()
number = len(log.read_text().splitlines()) + 1 if log.exists() else 1
name = re.search(r"job-name=(.*)", script)[1]
after = next((a.partition("=")[2] for a in sys.argv if a.startswith("--dependency")), "")
after = after or "".join(re.findall(r"#SBATCH --dependency=(.*)", script))
with log.open("a") as file:
    print(number, name, after, *re.findall(r"(?:partition|time|mem-per-cpu|account)=.*", script), file=file)
if "merge_stats" not in script:
    last = int(re.search(r"array=0-(\\d+)", script)[1])
    for task in range(last + 1):
        env = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "RUN_OFFSET": "0", "SLURM_NODELIST": "here"}}
        subprocess.run(["bash", "-c", script], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print("Submitted batch job", number)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands, as far as they are called."""
    pytest.importorskip("datatrove")
    (tmp_path / "bin").mkdir()
    log = tmp_path / "jobs.txt"
    commands = {
        "sbatch": SBATCH.format(python=sys.executable, log=str(log)),
        "srun": '#!/bin/bash\nwhile [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done\nexec "$@"\n',
        "scontrol": "#!/bin/bash\necho here\n",
    }
    for name, content in commands.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    return log


@pytest.mark.slow
def test_slurm_gets_a_job_for_each_stage(tmp_path, slurm):
    stages = [Tasks(tmp_path).stage(3), Tasks(tmp_path, "b").stage(2)]
    (tmp_path / "a1").write_text("done before")
    told = {"partition": "cpu", "time": "10:00", "account": "me"}
    submit(stages, Workers("slurm", 2, memory=3 << 30, sbatch=told), tmp_path / "work")
    assert done(tmp_path) == ["a0", "a1", "a2"] and done(tmp_path, "b") == ["b0", "b1"]
    jobs = slurm.read_text().splitlines()
    assert [line.split()[1] for line in jobs] == ["decoding-a", "decoding-a", "decoding-b", "decoding-b"]
    assert "afterok:1" in jobs[2] and "mem-per-cpu=3G" in jobs[0] and "account=me" in jobs[2]
    submit(stages, Workers("slurm", 2, sbatch=told), tmp_path / "work")
    assert slurm.read_text().splitlines() == jobs  # nothing is left


def test_slurm_refusals(tmp_path, monkeypatch):
    pytest.importorskip("datatrove")
    with pytest.raises(DecodingError, match="Slurm wants to know partition and time: add --sbatch partition="):
        submit([Tasks(tmp_path).stage()], Workers("slurm", 2), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    told = Workers("slurm", 2, sbatch={"partition": "cpu", "time": "10:00"})
    with pytest.raises(DecodingError, match="Slurm's sbatch cannot be called here"):
        submit([Tasks(tmp_path).stage()], told, tmp_path)


@pytest.fixture(scope="module")
def ray():
    """A cluster of two CPUs."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.mark.ray
class TestOnRay:
    def test_stages(self, tmp_path, ray):
        run([Tasks(tmp_path).stage(), Tasks(tmp_path, "b").stage()], Workers("ray", 2))
        assert len(done(tmp_path)) == len(done(tmp_path, "b")) == 4

    def test_a_worker_that_is_killed_is_replaced(self, tmp_path, ray):
        run([Tasks(tmp_path, worse="is killed").stage()], Workers("ray", 2))
        assert len(done(tmp_path)) == 4

    @pytest.mark.parametrize(
        ("worse", "says"),
        [
            ("fails", "task 1 of stage a failed: the text is blank"),
            ("lacks", "a worker lacks pyarrow"),
            ("memory", "a worker ran out of memory at stage a"),
        ],
    )
    def test_what_fails_is_said_and_the_same_again_goes_on(self, tmp_path, ray, worse, says):
        with pytest.raises(DecodingError, match=says):
            run([Tasks(tmp_path, worse=worse).stage()], Workers("ray", 2))
        run([Tasks(tmp_path).stage()], Workers("ray", 2))
        assert len(done(tmp_path)) == 4

    def test_what_no_machine_has_is_refused(self, tmp_path, ray):
        with pytest.raises(DecodingError, match="no machine of the Ray cluster has what a worker takes"):
            run([Tasks(tmp_path).stage()], Workers("ray", 2, gpus=1))
        with pytest.raises(DecodingError, match="no machine of the Ray cluster has what a worker takes"):
            run([Tasks(tmp_path).stage()], Workers("ray", 2, memory=1 << 50))


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DecodingError, match=r"pip install decoding-middleware\[cluster\]"):
        run([Tasks(tmp_path).stage()], Workers("ray", 1))

"""Kill training at random and at every file boundary of a save, damage its checkpoints, and see that nothing is lost.

    python tests/benchmarks/chaos.py
    python tests/benchmarks/chaos.py --kills 20 --flips 100 --stages diffusion --processes 1

Tiny runs on the CPU, always taken up again with --resume. A run that was killed has to end with the weights of one that
was not, to the bit; whatever has the name of a checkpoint has to verify; at most one save interval may be lost; and a
bit that was flipped or bytes that were cut off have to be found and the checkpoint before be used. Prints the figures
and a JSON line; the exit code is 1 if one of them is not as promised.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import mmap
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Imported here, not in the runs: each run is a fork of this process, which is a hundred times faster than a new Python.
import safetensors.torch
import torch
import torch._dynamo  # what an optimizer imports when it is made
import torch.utils.tensorboard

sys.path.insert(0, str(Path(__file__).parents[2]))

import latentdiff.training.loop.run
import latentdiff.training.train_autoencoder
import latentdiff.training.train_diffusion
from latentdiff.training.loop.checkpointing import checkpoint_folders, checkpoint_problem, load_latest

from latentdiff.commands.train import train as cli_train
from tests.training.test_stages import pictures, recipe

STEPS, INTERVAL = 40, 2
PATIENCE = 300.0  # seconds after which a process that should have ended counts as hung, even on a busy machine
GRACE = 10.0  # seconds that a launcher leaves the other processes when one has died
WRITERS = ((safetensors.torch, "save_file"), (Path, "write_text"))
OTHERS = ((os, "mkdir"), (os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"))


@dataclass
class Figures:
    """What is counted, over all runs."""

    random_kills: int = 0
    boundary_kills: int = 0
    boundaries: dict[str, int] = field(default_factory=dict)
    finished_runs: int = 0
    other_weights: int = 0
    unusable_checkpoints: int = 0
    most_steps_lost: int = 0
    errors: int = 0
    hung: int = 0
    damages: int = 0
    undetected: int = 0

    def failed(self) -> bool:
        """Say whether a promise was broken."""
        broken = self.other_weights + self.unusable_checkpoints + self.errors + self.hung + self.undetected
        return broken > 0 or self.most_steps_lost > INTERVAL


class Session:
    """One or two forked processes that train, until they are done or killed."""

    def __init__(self, config: str, out: Path, processes: int, die_at: int = 0) -> None:
        self.out, self.shared = out, mmap.mmap(-1, 16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        sys.stdout.flush()
        self.running = {}
        for rank in range(processes):
            pid = os.fork()
            if pid == 0:
                self._train(config, rank, processes, port, die_at)
            self.running[pid] = rank

    def _train(self, config: str, rank: int, processes: int, port: int, die_at: int) -> None:
        """Be one process of the run; never returns."""
        code = 1
        try:
            report = os.open(self.out.with_suffix(f".{rank}.txt"), os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(report, 1), os.dup2(report, 2)
            if processes > 1:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in place.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
            if rank == 0:
                _watch(self.shared, die_at)
            cli_train(config, [], True, str(self.out))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> bool:
        """Wait for all processes to end, at most so long; say whether they did."""
        end = time.monotonic() + seconds
        while self.running and time.monotonic() < end:
            for pid in list(self.running):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    rank = self.running.pop(pid)
                    if rank == 0:
                        self.status = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        return not self.running

    def kill(self, pids: list[int]) -> None:
        """End processes without a warning."""
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    @property
    def reached(self) -> int:
        """The last step that was done."""
        return int.from_bytes(self.shared[:8], "little")

    @property
    def boundaries(self) -> int:
        """Boundaries of a save that was lived through, or 0."""
        return int.from_bytes(self.shared[8:16], "little")


@dataclass
class Case:
    """A stage with a number of processes, and the weights that it has to end with."""

    stage: str
    config: str
    place: Path
    processes: int

    def __post_init__(self) -> None:
        self.broken = self.place / f"{self.stage}-{self.processes}-broken"
        unbroken, started = self.place / f"{self.stage}-{self.processes}", time.monotonic()
        assert Session(self.config, unbroken, self.processes).wait(PATIENCE)
        self.weights, self.seconds = _digest_of(unbroken), time.monotonic() - started
        self.kept = 0  # step of the newest checkpoint

    def start(self, die_at: int = 0) -> Session:
        """Go on with the broken run."""
        return Session(self.config, self.broken, self.processes, die_at)

    def look(self, session: Session, figures: Figures) -> None:
        """Count what a kill has cost; once they train, all processes have to end by themselves when one is killed.

        Before that they wait for one that never joins them, which whoever launched them has to end.
        """
        if not session.wait(PATIENCE if session.reached else GRACE):
            figures.hung += session.reached > 0
            session.kill(list(session.running))
            session.wait(PATIENCE)
        folders = checkpoint_folders(self.broken)
        figures.unusable_checkpoints += sum(1 for folder in folders if checkpoint_problem(folder))
        newest = int(folders[0].name.removeprefix("step-")) if folders else 0
        figures.most_steps_lost = max(figures.most_steps_lost, session.reached - newest, self.kept - newest)
        self.kept = newest

    def finish(self, session: Session, figures: Figures) -> None:
        """See that a run that nobody kills any more ends with the weights of the unbroken one, and clear it away."""
        session.wait(PATIENCE)
        self.look(session, figures)
        figures.finished_runs += 1
        if session.status:
            figures.errors += 1
            print(self.broken.with_suffix(".0.txt").read_text()[-2000:])
        elif _digest_of(self.broken) != self.weights:
            figures.other_weights += 1
        shutil.rmtree(self.broken, ignore_errors=True)
        self.kept = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="at random moments, over all stages and process counts")
    parser.add_argument("--flips", type=int, default=1000, help="bit flips and truncations, over all stages")
    parser.add_argument("--stages", nargs="+", default=["autoencoder", "diffusion", "lora"])
    parser.add_argument("--processes", nargs="+", type=int, choices=(1, 2), default=[1, 2])
    parser.add_argument("--ema-snapshots", type=int, default=0, help="of stage diffusion, every so many steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng, figures, started = random.Random(arguments.seed), Figures(), time.monotonic()
    cases = [(stage, processes) for stage in arguments.stages for processes in arguments.processes]
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # kill -9 leaves written files alone on any disk
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        place = Path(folder)
        pictures(place / "pictures", 6)
        snapshots = {"diffusion": arguments.ema_snapshots}
        stages = ("autoencoder", "diffusion", "lora")
        files = {stage: _config(place, stage, snapshots.get(stage, 0)) for stage in stages}
        last = max(map(stages.index, arguments.stages))
        for stage in stages[:last]:  # what the stages after these start from
            assert Session(files[stage], place / stage, 1).wait(PATIENCE)
        for number, (stage, processes) in enumerate(cases):
            kills = (number + 1) * arguments.kills // len(cases) - number * arguments.kills // len(cases)
            _kill_and_resume(Case(stage, files[stage], place, processes), kills, figures, rng)
        for stage in arguments.stages:
            run = place / f"{stage}-{arguments.processes[0]}"
            _damage(run, arguments.flips // len(arguments.stages), figures, rng)
    results = vars(figures) | {"seconds": round(time.monotonic() - started), "save_interval": INTERVAL}
    for name, value in results.items():
        print(f"{name.replace('_', ' '):22} {value}")
    print(json.dumps(results))
    sys.exit(figures.failed())


def _config(place: Path, stage: str, snapshots: int) -> str:
    """Write the tiny config of a stage."""
    often = {"run__save_every": INTERVAL, "run__ema_snapshots": snapshots}
    return recipe(place, stage, run__steps=STEPS, run__batch_size=2, run__seed=1, **often)


def _kill_and_resume(case: Case, kills: int, figures: Figures, rng: random.Random) -> None:
    """Kill the main process at each boundary of a save, then any process at random moments."""
    boundary = 0
    while True:
        boundary += 1
        session = case.start(die_at=boundary)
        session.wait(PATIENCE)
        if session.boundaries or session.status != -signal.SIGKILL:
            break
        figures.boundary_kills += 1
        case.look(session, figures)
    figures.boundaries[f"{case.stage}-{case.processes}"] = session.boundaries
    figures.errors += session.boundaries == 0  # the run ended before all of them were reached
    case.finish(session, figures)
    while kills:
        session = case.start()
        if session.wait(rng.uniform(0, 0.4 * case.seconds)):
            case.finish(session, figures)
            continue
        victims = list(session.running)
        session.kill(rng.choice([victims, victims[:1], victims[-1:]]))
        figures.random_kills += 1
        kills -= 1
        case.look(session, figures)
    case.finish(case.start(), figures)


def _watch(shared: mmap.mmap, die_at: int) -> None:
    """Tell the parent how far this process is, and die at a boundary of the first save that deletes an older one."""
    log_step, save = latentdiff.training.monitor.log.Log.step, latentdiff.training.loop.run.save_checkpoint
    passed, counting, counted = 0, False, False

    def boundary(last_act: Callable[[], Any] = lambda: None) -> None:
        nonlocal passed
        passed += counting
        if counting and passed == die_at:
            last_act()
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(log: Any, step: int, values: dict[str, Any]) -> None:
        log_step(log, step, values)
        shared[:8] = (step + 1).to_bytes(8, "little")

    def counted_save(run: Path, step: int, tensors: Any, state: Any, keep: int) -> Path:
        nonlocal counting, counted
        counting = die_at > 0 and not counted and len(checkpoint_folders(run)) >= keep
        place = save(run, step, tensors, state, keep)
        boundary()
        if counting:
            shared[8:16] = passed.to_bytes(8, "little")
            counting, counted = False, True
        return place

    def wrapped(call: Callable[..., Any], writes: bool) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            boundary()
            result = call(*arguments, **options)
            if writes:  # the half of a file
                file = next(argument for argument in arguments if isinstance(argument, Path))
                boundary(lambda: os.truncate(file, file.stat().st_size // 2))
            return result

        return wrapper

    latentdiff.training.monitor.log.Log.step, latentdiff.training.loop.run.save_checkpoint = tell, counted_save  # type: ignore[method-assign]
    for owner, name in (*WRITERS, *OTHERS):
        setattr(owner, name, wrapped(getattr(owner, name), (owner, name) in WRITERS))


def _digest_of(run: Path) -> str:
    """Return one digest of the last checkpoint's tensors, of all snapshots and of the model written at the end."""
    digest = hashlib.sha256()
    last = run / f"checkpoints/step-{STEPS:08d}"
    kept = [*sorted(last.glob("*.safetensors")), *sorted(run.glob("ema/*"))]
    exported = (*sorted(run.glob("model/**/*.safetensors")), *run.glob("vae/*"), *run.glob("lora.safetensors"))
    for file in (*kept, *exported):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _damage(run: Path, count: int, figures: Figures, rng: random.Random) -> None:
    """Flip a bit of a file of the newest checkpoint, or cut the file short, and see which checkpoint is loaded."""
    newest, before = checkpoint_folders(run)[:2]
    files = sorted(newest.iterdir())
    for _ in range(count):
        file = rng.choice(files)
        content = file.read_bytes()
        place = rng.randrange(len(content))
        flipped = bytes([content[place] ^ 1 << rng.randrange(8)])
        file.write_bytes(content[:place] + (flipped + content[place + 1 :] if rng.random() < 0.7 else b""))
        with contextlib.redirect_stderr(io.StringIO()) as told:
            checkpoint = load_latest(run)
        found = checkpoint is not None and checkpoint.folder == before and newest.name in told.getvalue()
        figures.damages += 1
        figures.undetected += not found
        file.write_bytes(content)


if __name__ == "__main__":
    main()

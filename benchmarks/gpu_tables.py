"""Table 2 of arXiv 2005.00393 and other losses on a GPU: jobs that run side by side, each a command that resumes.

A small network leaves most of a GPU idle, so several jobs share it. They are listed with the most valuable first, and
--jobs selects some. A job whose cache is not there yet waits for it. What a session does not finish, a later one does:
unpack its state-N.tar in the work folder.
"""

import fnmatch
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pack_images
from gpu_session import Session, stop

CLASSES = {"cifar10": 10, "cifar100": 100}
PUBLISHED = "resnet56-cifar10.th"  # the teacher of CIFAR-10, in the folder of images


@dataclass(frozen=True, eq=False)
class Job:
    """A command of tspipe.

    Attributes:
        needs: a file in the work folder that another job makes.
        makes: the file that it makes, or the folder of its run.
    """

    name: str
    arguments: list[str]
    needs: str | None = None
    makes: str | None = None


def run(session: Session) -> None:
    """Run the jobs until all have ended or the time is over."""
    datasets = [name for name in CLASSES if unpack(session, name)]
    jobs = sorted((job for name in datasets for job in jobs_of(session, name)), key=lambda job: priority(job.name))
    patterns = session.arguments.jobs
    selected = [job for job in jobs if any(fnmatch.fnmatch(job.name, pattern) for pattern in patterns)]
    run_jobs(session, selected, session.arguments.workers)


def unpack(session: Session, dataset: str) -> bool:
    """Return whether all classes of a dataset are in the work folder, after unpacking the pieces of it, if any."""
    folder = session.work / "images" / dataset
    if session.images:
        for piece in sorted(session.images.glob(f"{dataset}-*.zip")):
            mark = session.work / f"{piece.stem}.unpacked"
            if not mark.exists():
                pack_images.unpack(folder, [str(piece)])
                mark.touch()
        if not folder.exists() and (session.images / dataset).exists():
            folder.parent.mkdir(exist_ok=True)
            folder.symlink_to(session.images / dataset)
    complete = len(list(folder.glob("train/*"))) == len(list(folder.glob("test/*"))) == CLASSES[dataset]
    session.record("tables", f"images of {dataset}", complete=complete)
    return complete


def jobs_of(session: Session, dataset: str) -> list[Job]:
    """Return the jobs on a dataset: its teacher, its caches, and the students in each arm."""
    options = session.arguments
    device = ["--set", "device=cpu"] if session.tiny else []
    images = f"folder:{session.work / 'images' / dataset}"
    epochs = ["--epochs", str(options.epochs), *device, *[part for s in options.set for part in ("--set", s)]]
    jobs, teacher = [], f"teacher-{dataset}.safetensors"
    published = session.images and session.images / PUBLISHED
    if dataset == "cifar10" and published and published.exists():
        teacher = str(published)
    else:
        schedule = ["schedule=cosine", "warmup_epochs=3", "lr=0.4", "weight_decay=5e-4"]
        schedule += [f"batch_size={32 if session.tiny else 512}"]
        settings = [part for setting in schedule for part in ("--set", f"teacher.{setting}")]
        command = ["teacher", "--dataset", images, "--recipe", dataset, "--epochs", str(options.teacher_epochs)]
        jobs.append(Job(f"{dataset}-teacher", [*command, *settings, *device, "--out", teacher], makes=teacher))
    made_from = jobs[0].makes if jobs else None
    for kind in ("uniform", "mixed"):
        cache = f"{dataset}-{kind}.h5"
        command = ["cache", "--dataset", images, "--recipe", dataset, "--weights", teacher, "--out", cache, "--images"]
        command += ["--random-pool", "200" if session.tiny else "50000", "--set", f"random_kind={kind}"]
        command += ["--set", f"compute.batch_size={32 if session.tiny else 512}"]
        jobs.append(Job(f"{dataset}-{kind}", command, made_from, cache))

    def students(name: str, student: str, seeds: int, arms: str, *settings: str, kind: str = "uniform") -> None:
        cache = f"{dataset}-{kind}.h5"
        command = ["reproduce", "table2", "--dataset", f"{dataset}={images}", "--cache", cache, "--students", student]
        command += ["--arms", arms, "--seeds", str(seeds), *epochs, "--set", "random_source=pool"]
        command += [part for setting in settings for part in ("--set", setting)]
        jobs.append(Job(f"{dataset}-{student}-{name}", command, cache))

    mixed = ("random_kind=mixed", "random_images=128")
    for arm in ("alone", "taught", "random"):
        students(arm, "lenet5", options.seeds, arm)
    students("kd", "lenet5", options.seeds, "taught", "loss=kd")
    students("kd-mixed", "lenet5", options.seeds, "random", "loss=kd", *mixed, kind="mixed")
    students("ts-mixed", "lenet5", options.seeds, "random", *mixed, kind="mixed")
    for student in ("mobilenet_v2", "resnet18", "alexnet"):
        for arm in ("alone", "taught", "random"):
            students(arm, student, 1, arm)
        students("kd-mixed", student, 1, "random", "loss=kd", *mixed, kind="mixed")
    students("alone", "resnet20", 1, "alone")
    for loss in ("kd", "dkd", "lskd", "dkd_lskd", "ts"):
        students(loss, "resnet20", 1, "taught", f"loss={loss}")
    return jobs


def priority(name: str) -> tuple[int, int]:
    """Order teachers and caches first, then LeNet-5, methods for ResNet-20, and the larger students."""
    dataset, what, *_ = name.split("-")
    students = ["lenet5", "resnet20", "mobilenet_v2", "resnet18", "alexnet"]
    return (1 + students.index(what) if what in students else 0, int(dataset == "cifar10"))


def run_jobs(session: Session, jobs: list[Job], workers: int) -> None:
    """Run jobs, at most `workers` at a time, the first ones first, and record what became of each."""
    waiting = [job for job in jobs if not (job.makes and (session.work / job.makes).exists())]
    running: dict[Job, tuple[subprocess.Popen[bytes], float]] = {}
    threads = "1" if session.tiny else "2"

    def record(job: Job, state: str) -> None:
        seconds = time.monotonic() - running.pop(job)[1]
        session.record("tables", job.name, state=state, seconds=round(seconds, 1), command=" ".join(job.arguments))

    try:
        while waiting or running:
            for job, (process, _) in list(running.items()):
                if process.poll() is not None:
                    record(job, "finished" if process.returncode == 0 else f"exit code {process.returncode}")
            ready = [job for job in waiting if not job.needs or (session.work / job.needs).exists()]
            for job in ready[: workers - len(running)]:
                waiting.remove(job)
                process = session.start(["-m", "tspipe", *job.arguments], session.work, OMP_NUM_THREADS=threads)
                running[job] = process, time.monotonic()
            if not running:  # what the rest needs has failed
                break
            time.sleep(0.2)
    except BaseException:
        stop([process for process, _ in running.values()])
        for job in list(running):
            record(job, "stopped")
        raise
    finally:
        for job in waiting:
            session.record("tables", job.name, state="not started", command=" ".join(job.arguments))
        show(session)


def show(session: Session) -> None:
    """Write the report of all finished runs."""
    runs = [str(path.parent) for path in Path(session.work).glob("runs/*/summary.json")]
    if runs:
        command = [sys.executable, "-m", "tspipe", "report", *runs, "--out", str(session.work / "runs/report")]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        session.record("tables", "report", output=result.stdout.splitlines() or [result.stderr[-2000:]])

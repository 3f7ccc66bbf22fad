"""Checks and measures tspipe on a GPU: python benchmarks/gpu.py [STAGE…] [--seconds N] [--out FOLDER] …

works    the tests that need a GPU (make test-gpu)
stage1   stage one beside the bare teacher on device tensors, from arrays and files; bfloat16, TF32, memory layouts
stage2   LeNet-5's epochs, a cohort of twelve with live random images, ResNet-18's share of the convolution rate
tables   students on CIFAR-100 and CIFAR-10 (see gpu_tables.py), which need --images

After --seconds, what runs is stopped and a later call resumes it (of `tables`). FOLDER gets results.json, which is
written after each measurement, log.txt, runs.tar.gz (the small files of run folders) and state-N.tar (what a later call
resumes from; unpack it in the work folder). --device cpu tries everything with tiny numbers.
"""

import argparse
import sys
import traceback
from pathlib import Path

import gpu_stage1
import gpu_stage2
import gpu_tables
from gpu_session import OutOfTime, Session

ROOT = Path(__file__).resolve().parents[1]


def works(session: Session) -> None:
    """Run the tests that need a GPU."""
    report = session.out / "tests.xml"
    command = ["-m", "pytest", "tests/test_gpu.py", "-p", "no:cacheprovider", f"--junitxml={report}", "--durations=10"]
    code, seconds = session.python(command, ROOT, TSPIPE_TEST_GPU=session.device.type)
    session.record("works", "tests", exit_code=code, seconds=round(seconds, 1))


STAGES = {"works": works, "stage1": gpu_stage1.run, "stage2": gpu_stage2.run, "tables": gpu_tables.run}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", default=[], help=", ".join(STAGES))
    parser.add_argument("--seconds", type=float, default=3600, help="stop after this time (default: 3600)")
    parser.add_argument("--out", type=Path, default=Path("data/gpu-results"), help="the folder of results")
    parser.add_argument("--work", type=Path, default=Path("data/gpu"), help="caches, images, runs; kept between calls")
    parser.add_argument("--images", type=Path, help="a folder with cifar10 and cifar100, or pack_images.py's pieces")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    tables = parser.add_argument_group("tables")
    tables.add_argument("--jobs", nargs="*", default=["*"], metavar="PATTERN", help="such as 'cifar100-lenet5-*'")
    tables.add_argument("--workers", type=int, default=6, help="jobs at a time (default: 6)")
    tables.add_argument("--epochs", type=int, default=200)
    tables.add_argument("--teacher-epochs", type=int, default=100)
    tables.add_argument("--seeds", type=int, default=3, help="of LeNet-5; the others have one")
    tables.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all students")
    arguments = parser.parse_args()
    if unknown := set(arguments.stages) - set(STAGES):
        parser.error(f"There is no stage {', '.join(unknown)}. There are: {', '.join(STAGES)}.")
    session = Session(arguments)
    failed = False
    try:
        for name in arguments.stages or STAGES:
            try:
                STAGES[name](session)
            except Exception as problem:  # a later stage may still succeed
                failed = True
                session.record(name, "error", text="".join(traceback.format_exception(problem))[-4000:])
    except OutOfTime:
        session.record("session", "stopped", after=arguments.seconds)
    finally:
        session.pack()
    sys.exit(failed)


if __name__ == "__main__":
    main()

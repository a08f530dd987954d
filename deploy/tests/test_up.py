"""deploy/up.sh with the programs that `cargo build` made and the sketch suite."""

import os
import signal
import socket
import subprocess
import tarfile
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "target/debug"
SKETCH = ROOT / "models/sketch"
MODELS = ["captioner", "summarizer", "diffusion", "clip"]
ENV = os.environ | {"ORT_DYLIB_PATH": str(ROOT / "third_party/onnxruntime/lib/libonnxruntime.so")}


def free_ports():
    """The first of a row of ports that nobody listens on."""
    for first in range(42051, 60000, 100):
        try:
            for port in range(first, first + 21):
                with socket.socket() as taken:
                    taken.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def asked(folder, units, out, *where):
    """The command of a run on some of the suite's pictures."""
    command = [BIN / "dnd", "dissect", *where, "--target", SKETCH / "targets/planted/planted.onnx", "--layer", "pattern", "--units", units]
    return [*command, "--images", folder / "pictures", "--out", folder / out, "--num-inference-steps", "4", "--images-per-concept", "4"]


class Up:
    """A running deploy/up.sh."""

    def __init__(self, folder, *more):
        self.data = Path(folder) / "data"
        self.port = free_ports()
        command = [ROOT / "deploy/up.sh", "--bin", BIN, "--data", self.data, "--port", str(self.port), *more]
        self.process = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def said(self, text):
        """Everything that it prints up to a line with that text."""
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if text in line:
                return "".join(lines)
        raise AssertionError(f"it ended without saying {text!r}:\n{''.join(lines)}")

    def pid(self, name):
        return int((self.data / f"run/{name}.pid").read_text())

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(120)
        self.process.stdout.close()

    def dissect(self, folder, units):
        """Starts a run on some of the suite's pictures."""
        with tarfile.open(SKETCH / "probing.tar") as archive:
            archive.extractall(folder / "pictures", members=archive.getmembers()[::10], filter="data")
        command = asked(folder, units, "out", "--endpoint", f"http://127.0.0.1:{self.port}")
        job = subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # Whoever creates a job is told at once of a service that is away; the job itself waits for it.
        listed = [BIN / "dnd", "jobs", "list", "--json", "--endpoint", f"http://127.0.0.1:{self.port}"]
        while job.poll() is None and not subprocess.run(listed, env=ENV, capture_output=True, text=True).stdout.strip():
            time.sleep(0.05)
        return job


def running(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Tests(unittest.TestCase):
    def test_a_job_loses_and_repeats_nothing_while_each_service_is_taken_down_and_up(self):
        with tempfile.TemporaryDirectory() as folder:
            up = Up(folder)
            try:
                up.said("Ctrl-C stops it")
                job = up.dissect(Path(folder), "0-2")
                for name in ["orchestrator", "activation", *MODELS, "gateway"]:
                    before = up.pid(name)
                    os.kill(before, signal.SIGTERM)
                    ends = time.monotonic() + 30
                    while up.pid(name) == before or not running(up.pid(name)):
                        self.assertLess(time.monotonic(), ends, f"{name} did not come back")
                        time.sleep(0.1)
                    if name == "orchestrator":
                        self.assertIsNone(job.poll(), "the job was over before anything was taken down")
                said, _ = job.communicate(timeout=180)
                self.assertEqual(job.returncode, 0, said)
                self.assertIn("3 labelled, 0 dead, 0 failed", said)
            finally:
                up.stop()
            # All by one process that nothing happens to.
            whole = subprocess.run(asked(Path(folder), "0-2", "whole", "--models", SKETCH), env=ENV, capture_output=True, text=True)
            self.assertEqual(whole.returncode, 0, whole.stderr)
            results = [(Path(folder) / out / "results.jsonl").read_text() for out in ["out", "whole"]]
            self.assertEqual(*results, "no unit is missing, none is there twice, and none is another")
            pids = [int(pid.read_text()) for pid in (up.data / "run").glob("*.pid")]
            self.assertEqual(pids, [], "what has ended leaves no process id behind")

    def test_stopping_it_ends_every_process(self):
        with tempfile.TemporaryDirectory() as folder:
            up = Up(folder)
            up.said("Ctrl-C stops it")
            pids = [up.pid(name) for name in [*MODELS, "activation", "orchestrator"]]
            self.assertTrue(all(map(running, pids)))
            up.stop()
            self.assertFalse(any(map(running, pids)))

    @unittest.skipUnless(list(Path("/usr/lib/postgresql").glob("*/bin/initdb")), "PostgreSQL is missing (Debian: apt install postgresql)")
    def test_a_database_of_its_own_is_made_once_and_ends_with_the_rest(self):
        # Where the user postgres can reach it.
        with tempfile.TemporaryDirectory() as folder:
            os.chmod(folder, 0o755)
            for _ in range(2):
                up = Up(folder, "--postgres")
                up.said("Ctrl-C stops it")
                server = int((up.data / "postgres/postmaster.pid").read_text().split()[0])
                self.assertTrue(running(server))
                self.assertEqual(list((up.data / "orchestrator").glob("*.sqlite")), [], "results go to the database")
                up.stop()
                # Its file of the process id goes a moment before it does.
                ends = time.monotonic() + 20
                while running(server):
                    self.assertLess(time.monotonic(), ends, "the database still runs")
                    time.sleep(0.1)
            self.assertEqual((up.data / "postgres.password").stat().st_mode & 0o077, 0, "a secret of this machine's user")

    def test_a_service_that_can_not_start_stops_all_and_says_why(self):
        with tempfile.TemporaryDirectory() as folder:
            models = Path(folder) / "models"
            models.mkdir()
            for name in ["captioner", "summarizer", "diffusion"]:
                (models / name).symlink_to(SKETCH / name)
            (models / "clip").mkdir()
            up = Up(folder, "--models", models)
            said, _ = up.process.communicate(timeout=120)
            self.assertEqual(up.process.returncode, 1, said)
            self.assertIn("clip", said)
            self.assertIn("config.json", said)

    def test_what_is_typed_wrongly_is_answered_with_what_would_be_right(self):
        for wrong in [["--moddels", "x"], ["--port", "x"], ["--models"]]:
            done = subprocess.run([ROOT / "deploy/up.sh", *wrong], capture_output=True, text=True)
            self.assertEqual(done.returncode, 2)
            self.assertIn("usage:", done.stderr)


if __name__ == "__main__":
    unittest.main()

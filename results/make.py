"""A small make: commands of Python, each in one thread, some side by side, none of them twice."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time


class Cell:
    """A command, and the file that it makes: FOLDER/NAME/NAME.ending, for which @ stands in it.

    needs    the cells that must be made before
    start    one more, whose file is copied first, so that the command goes on from it
    records  JSON-lines file. If given, the command writes a record of evaluate.py, which becomes a
             line of that file, with the chain of all commands that led to it

    Beside the file are log.txt and state.json: the cell's key, the seconds spent, whether it is
    done, the file's hash. The key is a hash of the command and of the keys of all that it needs, so
    a changed command also makes anew what depends on it.
    """

    def __init__(self, folder, name, ending, command, needs=(), start=None, records=None):
        self.name = name
        self.file = folder / name / f"{name}{ending}"
        self.start = start
        self.records = records
        self.needs = [*needs, start] if start else list(needs)
        self.command = command.replace("@", str(self.file))
        lines = [f"cp {start.file} {self.file}"] if start else []
        lines.append(f"python {self.command}")
        self.commands = [line.replace(f"{folder}/", "OUT/") for line in lines]  # as in a record
        text = "\n".join([*self.commands, *[need.key for need in self.needs]])
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]

    def state(self):
        path = self.file.with_name("state.json")
        if path.exists():
            return json.loads(path.read_text())
        return dict(key=None, seconds=0, done=False)

    def write_state(self, **values):
        write(self.file.with_name("state.json"), json.dumps(self.state() | values) + "\n")

    def is_made(self):
        if self.records:
            return self.key in [record["about"]["key"] for record in read_records(self.records)]
        state = self.state()
        return state["done"] and state["key"] == self.key and self.file.exists()

    def begin(self, lock):
        """Starts the command, or goes on with one that was stopped; -> its process."""
        state = self.state()
        changed = state["key"] not in (None, self.key)
        if changed:
            print(f"{self.name}: was made by other commands, is made again", flush=True)
        if changed or state["done"]:  # done, but its file or its record was deleted
            shutil.rmtree(self.file.parent)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.start and not self.file.exists():
            partial = self.file.with_name("copy.tmp")
            shutil.copy(self.start.file, partial)
            partial.replace(self.file)
        self.spent = self.state()["seconds"]
        self.began = time.time()
        self.write_state(key=self.key, done=False)
        with open(self.file.with_name("log.txt"), "a") as log:
            return subprocess.Popen(
                [sys.executable, *self.command.split()],
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def end(self, done):
        """Notes what its process has done. A record is complete before the cell counts as done."""
        self.write_state(seconds=round(self.spent + time.time() - self.began, 1))
        if not done:
            return
        self.write_state(sha256=hashlib.sha256(self.file.read_bytes()).hexdigest())
        if self.records:
            self.publish()
        self.write_state(done=True)

    def publish(self):
        chain = []
        for cell in closure([self]):
            state = cell.state()
            part = dict(commands=cell.commands, seconds=state["seconds"], sha256=state["sha256"])
            chain.append(part)
        seconds = round(sum(part["seconds"] for part in chain), 1)
        record = json.loads(self.file.read_text())
        record["about"] |= dict(cell=self.name, key=self.key, seconds=seconds, chain=chain)
        before = self.records.read_text() if self.records.exists() else ""
        write(self.records, before + json.dumps(record) + "\n")


def write(path, text):
    """Replaces a file; a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_text(text)
    partial.replace(path)


def read_records(path):
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def closure(cells):
    """Cells and all that they need, each once, after what it needs."""
    found = {}
    for cell in cells:
        found |= dict.fromkeys([*closure(cell.needs), cell])
    return list(found)


def make(goals, folder, jobs):
    """Makes what is missing of `goals`, `jobs` at a time.

    A signal, or a command that fails, stops the other commands, which save their checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The commands hold the lock, too: if this process is killed, the next one waits for them
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: waiting for the commands of another run", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    missing = [goal for goal in goals if not goal.is_made()]
    waiting = [cell for cell in closure(missing) if not cell.is_made()]
    print(f"{folder}: {len(waiting)} commands to run, logs in {folder}/*/log.txt", flush=True)
    running = {}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            begin_some(waiting, running, jobs, lock)
            time.sleep(0.1)
            end_some(waiting, running)
    except KeyboardInterrupt:
        raise SystemExit(f"{folder}: stopped; the same command goes on") from None
    finally:
        for process in running.values():
            process.terminate()
        for cell, process in running.items():
            process.wait()
            cell.end(done=False)
        os.close(lock)


def begin_some(waiting, running, jobs, lock):
    unmade = [*waiting, *running]
    for cell in list(waiting):
        if len(running) < jobs and not any(need in unmade for need in cell.needs):
            waiting.remove(cell)
            running[cell] = cell.begin(lock)


def end_some(waiting, running):
    for cell, process in list(running.items()):
        if process.poll() is None:
            continue
        del running[cell]
        cell.end(done=process.returncode == 0)
        if process.returncode != 0:
            log = cell.file.with_name("log.txt").read_text().replace("\r", "\n")
            last = log.strip().splitlines()[-8:]
            raise SystemExit("\n".join([f"failed: python {cell.command}", *last]))
        seconds = cell.state()["seconds"]
        print(f"{cell.name}: {seconds:.0f} s; {len(waiting)} more wait", flush=True)

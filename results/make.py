"""A small make: commands of Python, each in one thread, as many side by side as wanted, none of them twice."""

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
    """A command and the file or folder it makes, FOLDER/NAME/NAME.ending, which stands as @ in it. Beside that lie its
    log.txt and made.json: its key, the seconds spent, whether it is done, its output's hash.

    needs     the cells to be made before
    start     one more, whose output is copied for the command to go on from
    record    where to publish an output in JSON, with the chain of commands that led to it
    """

    def __init__(self, folder, name, ending, command, needs=(), start=None, record=None):
        self.name, self.output, self.record = name, folder / name / f"{name}{ending}", record
        self.command, self.start = command.replace("@", str(self.output)), start
        self.needs = [*needs, start] if start else [*needs]
        # The command's hash with those of all that led to it: a changed setting makes anew what depends on it
        known = [self.command.replace(str(folder), "OUT"), *(need.key for need in self.needs)]
        self.key = hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]

    def stamp(self, **values):
        """made.json, with `values` written into it if there are any; a kill leaves the old one or the new one."""
        path = self.output.with_name("made.json")
        stamp = (
            json.loads(path.read_text()) if path.exists() else dict(key=None, seconds=0, done=False)
        ) | values
        if values:
            path.with_suffix(".tmp").write_text(json.dumps(stamp, indent=1))
            os.replace(path.with_suffix(".tmp"), path)
        return stamp

    def made(self):
        stamp = self.stamp()
        return (
            stamp["done"]
            and stamp["key"] == self.key
            and all(path.exists() for path in (self.output, self.record) if path)
        )

    def published(self):
        """Whether there is a record of these commands, of this or another machine's run."""
        return (
            self.record
            and self.record.exists()
            and json.loads(self.record.read_text())["about"]["key"] == self.key
        )

    def run(self, lock):
        if self.stamp()["key"] not in (None, self.key):
            print(f"{self.name}: was made by other commands, is made again", flush=True)
            shutil.rmtree(self.output.parent)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        if (
            self.start and not self.output.exists()
        ):  # goes on from a copy: the other stays as it was drawn from
            shutil.copy(self.start.output, f"{self.output}.tmp")
            os.replace(f"{self.output}.tmp", self.output)
        before = self.stamp()
        self.began = time.time() - (
            0 if before["done"] else before["seconds"]
        )  # of a run that was stopped
        self.stamp(key=self.key, done=False)
        with open(self.output.with_name("log.txt"), "a") as log:
            return subprocess.Popen(
                [sys.executable, *self.command.split()],
                stdout=log,
                stderr=log,
                pass_fds=(lock,),
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def ended(self, done):
        self.stamp(done=done, seconds=round(time.time() - self.began, 1))
        if done and self.output.is_file():
            self.stamp(sha256=hashlib.sha256(self.output.read_bytes()).hexdigest())
        if done and self.record:
            record, chain = json.loads(self.output.read_text()), []
            for cell in closure([self]):
                copied = [f"cp {cell.start.output} {cell.output}"] if cell.start else []
                chain.append(
                    dict(
                        commands=[*copied, f"python {cell.command}"],
                        seconds=cell.stamp()["seconds"],
                        sha256=cell.stamp().get("sha256"),
                    )
                )
            record["about"] |= dict(
                key=self.key, hours=sum(part["seconds"] for part in chain) / 3600, chain=chain
            )
            self.record.parent.mkdir(parents=True, exist_ok=True)
            self.record.write_text(json.dumps(record, indent=1) + "\n")


def closure(goals):
    """Cells and all that they need, each once, after what it needs."""
    return list(dict.fromkeys(cell for goal in goals for cell in (*closure(goal.needs), goal)))


def make(goals, folder, jobs):
    """Runs what is missing. A signal, or a command that fails, stops the others, which save their checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(
        folder / "lock", os.O_CREAT | os.O_RDWR
    )  # the commands hold it too, should this process be killed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{folder}: waiting for the commands of another run", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    wanted, running = [goal for goal in goals if not goal.published()], {}
    left = [cell for cell in closure(wanted) if not cell.made()]
    total = len(left)
    print(
        f"{folder}: {total} commands to run, {jobs} side by side; logs in {folder}/*/log.txt",
        flush=True,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while left:
            ready = [
                cell
                for cell in left
                if cell not in running and not any(need in left for need in cell.needs)
            ]
            for cell in ready[: jobs - len(running)]:
                running[cell] = cell.run(lock)
            time.sleep(0.1)
            for cell in [cell for cell in running if running[cell].poll() is not None]:
                code = running.pop(cell).returncode
                cell.ended(done=code == 0)
                if code:
                    last = (
                        cell.output.with_name("log.txt")
                        .read_text()
                        .replace("\r", "\n")
                        .strip()
                        .splitlines()[-8:]
                    )
                    raise SystemExit("\n".join([f"failed: python {cell.command}", *last]))
                left.remove(cell)
                print(
                    f"{total - len(left)}/{total}  {cell.name}, {cell.stamp()['seconds']:.0f} s",
                    flush=True,
                )
    except KeyboardInterrupt:
        raise SystemExit(f"{folder}: stopped; the same command goes on") from None
    finally:
        for process in running.values():
            process.terminate()
        for cell, process in running.items():
            process.wait()
            cell.ended(done=False)
        os.close(lock)

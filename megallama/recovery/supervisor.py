"""The process beside a rank: forwards signals, learns its end, watches it with the others, and ends what hangs.

`megallama.train.supervised` starts it. It never touches torch, a GPU or the connections of the run; supervisors of one
host see one another's records, and one of every host is connected to that of rank 0, the root. Without the root each
host decides alone.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import NoReturn

from megallama.comm import flight_record as flight
from megallama.config.errors import ranges
from megallama.recovery.copy_files import CopyFiles
from megallama.recovery.doctor import hung, stacks
from megallama.recovery.flight_reader import FlightReader
from megallama.recovery.goodput import Goodput
from megallama.recovery.keeper import Keeper
from megallama.recovery.link import WAITING, Links, Message
from megallama.recovery.membership import Members, wait, waits
from megallama.recovery.node import SILENT, STATUS_PERIOD, Node, out_of_memory_kills, process_state, signal_name
from megallama.recovery.siblings import Siblings
from megallama.recovery.straggler import Stragglers
from megallama.train.signals import FAILED, SAVED, SIGNALS

PERIOD, HASTE, BEAT_PERIOD = 0.2, 0.02, 1.0  # seconds between looks, also where all leave; messages to the root
LEAVE, MEET = 5.0, 10.0  # seconds in which: a trainer leaves once the run is over; supervisors of a host have met
ROOT, REPORTS, ECHO = 4.0, 2.0, 1.0  # seconds to wait for: the root's verdict; all hosts' reports; a first cause
REPLACED = 20.0  # seconds for killed trainers to end, on all hosts before the next ones begin
_KILLERS = ("openmpi", "mpich")  # launchers that leave no time to the others when a process has ended badly
_LAUNCHERS = ("torchrun", *_KILLERS)  # whose death leaves their processes alone
_MAKER = "import sys; sys.path.insert(0, sys.argv[1]); from megallama.pretrain import process; sys.exit(process(True))"
_NORMAL = (0, 2, SAVED)  # statuses of trainers that nobody need be told of


def main() -> NoReturn:
    """argv: root folder, files of the flight record, the child, whether that makes the trainers; the launcher's."""
    Supervisor(FlightReader(*map(int, sys.argv[2].split(","))), int(sys.argv[3]), sys.argv[4] != "0").run()


class Supervisor:
    """Of one rank."""

    def __init__(self, record: FlightReader, child: int, several: bool) -> None:
        self._record, self._child, self._several = record, child, several
        self._generation = self._child_ended = self._made_again = 0
        self._node: Node | None = None  # once the trainers have told of the run
        self._siblings = Siblings(record)
        self._links, self._stragglers, self._keeper = Links(), Stragglers(()), Keeper(record, self._say, CopyFiles())
        self._goodput: Goodput | None = None  # rank 0's, as is
        self._members: Members | None = None
        self._launcher, self._oom = record.words[flight.LAUNCHER], out_of_memory_kills()  # it may have gone meanwhile
        self._signals, self._sent = list[int](), list[int]()  # for the trainer, once it is there; what it has
        self._warned: set[str] = set()
        self._writer = threading.Thread()  # of the status
        self._begin()
        self._pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in (*SIGNALS, signal.SIGCHLD):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _begin(self) -> None:
        """Nothing is known of a trainer; what the last one was asked, the next one is."""
        self._signals, self._sent = [*self._sent, *self._signals], []
        self._status: int | None = None  # once it has left, as waitpid has it
        self._verdict: Message | None = None
        self._orphaned = self._ending = False  # the trainer was told that the launcher has gone; a verdict ends it
        self._left = self._deadline = self._killed = 0.0  # moments: it left, it is to be killed, it was;
        self._asked = self._overdue = self._resumed = 0.0  # all were asked; a wait was too long; this one was stopped
        self._decided = time.monotonic()
        self._next_status = self._next_beat = self._speak = 0.0
        self._reports: dict[int, Message] = {}
        self._busy: dict[int, tuple[int, list[int]]] = {}
        self._over: dict[int, list[int]] = {}  # hosts all of whose trainers have ended: who can have another
        place: Message = self._record.told("place") or {}
        if self._node is not None and place.get("seats") in (None, self._node.about["seats"]):
            self._node.early, self._node.born = True, time.monotonic()  # the same ranks
        elif self._node is not None:
            self._node.close()
            self._node = None

    def run(self) -> NoReturn:
        """Until the trainer has left."""
        last = time.monotonic()
        while True:
            period = PERIOD if self._verdict is None else HASTE
            ready = select.select([self._pipe[0], *(s.fileno() for s in self._links.sockets())], [], [], period)[0]
            now = time.monotonic()
            if now - last > SILENT:  # stopped with its trainer, by a terminal say: nobody is late because of that
                self._resumed = now
            last, self._record.words[flight.BEAT] = now, time.monotonic_ns()
            if self._record.words[flight.GENERATION] != self._generation:
                self._generation = self._record.words[flight.GENERATION]
                self._begin()
                self._reap_children()
                if not self._child:
                    self._start_maker()
            self._forward(self._pipe[0] in ready)
            self._reap(now)
            self._introduce()
            if self._verdict is None or self._verdict["again"]:  # another supervisor may have one, or another by now
                self._verdict = self._record.told("verdict") or self._verdict
            if self._node is not None:
                self._keeper.look(self._node.about)
                self._watch(self._node, now)
            elif (place := waits(self._record)) and self._status is None:
                if (status := wait(self._record, place, self._links, self._signals)) is not None:
                    self._say(f"launched rank {place['seat']} leaves, which had no place; status {status}")
                    os._exit(status)
            if self._record.words[flight.GENERATION] == self._generation:
                self._end(now)

    def _forward(self, any_came: bool) -> None:
        self._signals += [n for n in os.read(self._pipe[0], 4096) if n in SIGNALS] if any_came else []
        while self._signals and self._record.words[flight.TRAINER] and self._status is None:
            self._sent.append(self._signals.pop(0))
            self._kill(self._sent[-1])

    def _kill(self, number: int) -> None:
        """Signal the trainer; whoever makes the trainers may know already that it has ended."""
        with suppress(ProcessLookupError):
            trainer, ended = (self._record.words[n] for n in (flight.TRAINER, flight.ENDED))  # then it may be another's
            if trainer and not ended and self._record.words[flight.GENERATION] == self._generation:
                os.kill(trainer, number)

    def _reap_children(self) -> None:
        with suppress(ChildProcessError):  # of the trainer, or who makes the trainers; of a dead one the orphans too
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self._child:
                    self._child, self._child_ended = 0, found[1]

    def _start_maker(self) -> None:
        """In place of a dead one: the spare of that, or one that has nothing imported."""
        with suppress(ChildProcessError):
            if (spare := self._record.words[flight.SPARE]) > 0 and os.waitpid(spare, os.WNOHANG)[0] == 0:
                self._child, self._record.words[flight.SPARE] = spare, -spare
                return
        command = [sys.executable, "-c", _MAKER, *sys.argv[1:3], *sys.argv[5:]]
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # as the first one had them
        self._child = os.spawnv(os.P_NOWAIT, sys.executable, command)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def _reap(self, now: float) -> None:
        self._reap_children()
        if self._status is not None:
            return
        ended = self._record.words[flight.ENDED] if self._several else 0
        there = self._child or (self._several and process_state(self._record.words[flight.TRAINER]) not in "XZ")
        if not ended and there:
            return  # with its maker a trainer dies, but not at once
        status = ended - 1 if ended else self._child_ended
        code = os.waitstatus_to_exitcode(status)
        why = f"left with status {code}, and did not say why" if code >= 0 else f"killed by {signal_name(-code)}"
        if -code == signal.SIGKILL and out_of_memory_kills() > self._oom:
            why += ": out of memory (the kernel counts such a kill)"
        why = f"the process that makes its trainers: {why}" if self._several and not ended else why
        if code < 0 and self._made_alone(f"its trainer: {why}" if ended else why):
            return
        self._status, self._left = status, now
        self._record.ends(code if code not in _NORMAL else 1, why, final=not self._several)
        if not ended:  # else who makes the trainers has said so, and the next may have begun meanwhile
            self._record.words[flight.ENDED] = status + 1
        elif self._record.words[flight.GENERATION] != self._generation:
            self._record.tell("cause", None)  # it would be the next one's

    def _made_alone(self, why: str) -> bool:
        """Whether another maker is started, and nobody need know: this rank has not come to the others, or waits."""
        if self._node is not None or self._made_again >= (most := self._siblings.max_replacements * self._several):
            return False
        came = self._siblings.expected or self._record.words[flight.LIMIT] or self._record.told("cause")
        if came and not waits(self._record):
            return False
        if self._child:  # it makes no other in the same generation
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
        self._record.begin_again()
        self._begin()
        self._made_again += 1
        self._start_maker()
        self._say(f"warning: {why}; another is started ({self._made_again} of {most})")
        return True

    def _introduce(self) -> None:
        before, first = self._node, not self._links.token  # the latter: no trainer has told of the run so far
        if before is not None and not before.early:
            return
        about = self._record.told("about") or {}
        if about.get("port") == -1 and not self._record.words[flight.PORT]:
            self._record.words[flight.PORT] = self._links.listen(about["address"])
        if about.get("port", -1) != -1:
            self._node = Node(about, self._record)
            self._links.token, self._stragglers = about["token"], Stragglers(about["stage"])
            if before is not None:
                before.close()
        elif before is None and first and not waits(self._record):
            self._node = self._siblings.meet(about)
        if (node := self._node) is not None and node is not before and node.rank == 0:
            self._goodput = Goodput(node.folder / "goodput.json")
            self._members = Members(node.about, self._links) if first else self._members

    def _watch(self, node: Node, now: float) -> None:
        leads, about = node.leader, node.about
        if about["port"] and node.host != about["host_of"][0]:
            self._links.connect(about["address"], about["port"], {"host": node.host} if leads else {})
        for host, message in self._links.poll():
            self._hear(node, host, message, now)
        if self._goodput is not None:
            self._goodput.count(self._record.words[flight.STEP], flight.PHASES[self._record.words[flight.PHASE]])
        if not leads:
            return
        if self._undecided:
            self._look_for_deaths(node, now)
        if self._undecided:
            self._look_for_waits(node, now)
        if (verdict := self._verdict) and verdict["again"] and not self._speak:  # what is begun again is said before
            self._replace(node, now, verdict)
        if now >= self._next_beat:
            self._next_beat = now + BEAT_PERIOD
            self._links.send({"busy": node.busy()} if node.rank else {})
            if node.rank == 0:
                self._compare(node)
                self._grow(node)
            self._warn_of_silence(node, now)
        if now >= self._next_status:
            self._next_status = now + STATUS_PERIOD
            if not self._writer.is_alive():  # a disk that is stuck must not make this supervisor silent
                self._writer = threading.Thread(target=self._write_status, args=[node], daemon=True)
                self._writer.start()

    def _hear(self, node: Node, host: int, message: Message, now: float) -> None:
        if node.rank and "verdict" in message:
            self._adopt(node, message["verdict"])
        elif node.rank and message.get("ask"):
            self._links.send({"reports": node.reports()})
        elif host >= WAITING and self._members is not None:
            self._signals += {*message.get("signals", [])} - {*self._sent, *self._signals}
            if "asks" in message and (answer := self._members.answer(message)):
                self._links.send(answer, host)
        elif "died" in message and self._undecided:
            self._decide(node, now, message["died"])
        elif "overdue" in message:
            self._overdue = self._overdue or now
        elif "end" in message:  # of its last supervisor, it may be: no silence any more
            self._links.heard.pop(host, None)
        elif message.get("over") == self._generation:  # and not that of trainers before
            self._over[host] = message["able"]
        elif node.rank and "generation" in message:
            node.begin_generation(message["generation"], message["place"])
        self._reports |= {int(rank): report for rank, report in message.get("reports", {}).items()}
        self._busy |= {int(rank): (steps, times) for rank, (steps, times) in message.get("busy", {}).items()}

    def _look_for_deaths(self, node: Node, now: float) -> None:
        for rank, record in node.records.items():
            cause = record.told("cause") if node.ended(rank) else node.lost(rank)
            if cause is None or cause["status"] in _NORMAL:
                continue
            status = cause["status"] if cause["status"] > 0 else FAILED if record.words[flight.STEP] else 1
            if cause["echo"] and not (self._left and now - self._left > ECHO):
                continue  # there was another before, of which more is known
            text = f"rank {rank} ({node.hosts[rank]}) failed first: {cause['text']}"
            said, commits = cause["status"] > 0, not record.words[flight.SAVING]  # without its part no save ends
            died = {"rank": rank, "text": text, "status": status, "hang": False, "commits": commits}
            died |= {"said": said, "lost": [rank] if cause["final"] else []}
            self._links.send({"died": died} if node.rank else {})
            if not node.rank or not self._links.sockets():
                self._decide(node, now, died)
            return

    def _look_for_waits(self, node: Node, now: float) -> None:
        cut_off = self._cut_off(node, now)
        if not (cut_off or self._overdue or node.overdue(self._resumed)):
            return
        if not self._overdue:
            self._overdue = now
            self._links.send({"overdue": True})
        there = {host for host, heard in self._links.heard.items() if now - heard < SILENT} | {node.host}
        if node.rank and node.about["host_of"][0] in there - {node.host} and now - self._overdue < ROOT:
            return  # the root decides
        if not self._asked:
            self._asked = now
            self._links.send({"ask": True} if node.rank == 0 else {})
            self._reports |= node.reports()
        asked = there if node.rank == 0 else {node.host}
        everyone = [rank for rank, host in enumerate(node.about["host_of"]) if host in asked]
        if now - self._asked < REPORTS and not all(rank in self._reports for rank in everyone):
            return
        if not cut_off and not any("wait" in r or r["process"] == "T" for r in self._reports.values()):
            self._asked = self._overdue = 0.0  # it has come meanwhile
            self._reports.clear()
            return
        ranks, text = hung(self._reports, node.hosts)
        began = any(report["step"] for report in self._reports.values())
        saving = [r for r in self._reports.values() if r["saving"]]
        going = [r for r in saving if "wait" in r]
        held = any(r["process"] in "TtX" or (r["process"] == "D" and "wait" in r) for r in saving)
        lost = [r for r in range(len(node.hosts)) if r not in self._reports or (r in node.records and node.lost(r))]
        died = {"rank": ranks[0] if ranks else node.rank, "text": text, "status": FAILED if began else 1, "hang": True}
        self._decide(node, now, died | {"commits": bool(going) and not lost and not held, "said": False, "lost": lost})
        self._say(f"error: {text}\n{stacks(self._reports)}", aloud=False)

    def _decide(self, node: Node, now: float, died: Message) -> None:
        """The run is over. `said`: the culprit told why; `lost`: who cannot be replaced; `commits`: a save may end."""
        text, status, hang, said, lost = (died[name] for name in ("text", "status", "hang", "said", "lost"))
        again = self._members is not None and status in (1, FAILED) and self._next(node) != ""
        if self._members is not None and again and lost:
            left = (seat for rank, seat in enumerate(self._members.seats) if rank not in lost)
            seats, why = self._members.next_world(left)
            again, text = bool(seats), f"{text}\n{why}" if node.about["min_replicas"] and not seats else text
        if again:
            said, text = False, f"{text}\nall ranks start again ({self._next(node)})"
        verdict = died | {"text": text, "again": again}
        if not again:  # before anybody hears it and leaves: mpirun kills the others once one has left
            self._write_exit(node, -signal.SIGTERM, verdict, {})
            if not (said or hang) and node.about["launcher"] in _KILLERS:
                self._say(f"error: {text}")
                said = True
        self._adopt(node, verdict)
        if not said:  # while a trainer that can hear it leaves, it says it
            self._speak = now + (0.0 if hang or again or self._status is not None else ECHO)

    def _adopt(self, node: Node, verdict: Message) -> None:
        self._verdict, self._decided = verdict, time.monotonic()
        self._links.send({"verdict": verdict} if node.rank == 0 else {})
        for record in node.records.values():
            record.tell("verdict", verdict)

    def _replace(self, node: Node, now: float, verdict: Message) -> None:
        """Once all trainers of all hosts have ended, the next ones begin; a host that does not say so is lost."""
        if verdict.get("asked") and self._status is None:
            self._decided = now
        if all(node.gone(rank) for rank in node.records):
            self._over[node.host] = [node.about["seats"][rank] for rank in node.able()]
            self._links.send({"over": self._generation, "able": self._over[node.host]} if node.rank else {})
        late, heard = now - self._decided > REPLACED, self._links.heard
        missing = {*node.about["host_of"]} - self._over.keys()
        missing = {host for host in missing if now - max(heard.get(host, 0.0), self._decided) < 2 * SILENT and not late}
        if self._members is None or missing or node.host not in self._over:
            verdict["again"] = not late
            return
        seats, text = self._members.next_world(seat for able in self._over.values() for seat in able)
        if not seats:
            self._say(f"error: {text}")
            return self._adopt(node, verdict | {"again": False, "text": f"{verdict['text']}\n{text}"})
        if text:
            self._say(text)
        place = self._members.begin(seats)
        self._links.send({"generation": self._generation + 1, "place": place})
        node.begin_generation(self._generation + 1, place)

    def _grow(self, node: Node) -> None:
        """Once ranks that wait make replicas whole, all are asked to save, stop and start again."""
        if self._members is None or self._verdict is not None or not (number := self._next(node)):
            return
        seats, _ = self._members.next_world(self._members.seats)
        if len(seats) > len(node.hosts) and self._record.words[flight.PHASE]:  # none is setting up
            back = ranges(sorted({*seats} - {*self._members.seats}))
            text = f"launched rank {back} can go on: all ranks save, stop and start again ({number})"
            self._say(text)
            verdict = {"rank": 0, "text": text, "status": SAVED, "hang": False, "commits": True, "again": True}
            self._adopt(node, verdict | {"asked": True})
            self._kill(signal.SIGUSR1)

    @property
    def _undecided(self) -> bool:
        """Whether nothing has failed so far."""
        return self._verdict is None or "asked" in self._verdict

    def _next(self, node: Node) -> str:
        number, most = self._generation + 1, node.about["max_replacements"]
        return f"replacement {number} of {most}" if number <= most else ""

    def _compare(self, node: Node) -> None:
        self._busy |= node.busy()
        for rank, excess in self._stragglers.look(self._busy):
            text = f"its own work takes {excess:.2f} times as long as that of the ranks with the same work"
            self._say(f"warning: rank {rank} ({node.hosts[rank]}) is slow: {text}")
        if slowest := self._stragglers.slowest:
            words, (rank, excess) = self._record.words, slowest
            words[flight.SLOWEST], words[flight.EXCESS] = rank + 1, int(1e6 * excess)

    def _silent(self, node: Node, now: float, seconds: float) -> set[int]:
        """The hosts that this supervisor should hear of, and has not for so long."""
        hosts, first = node.about["host_of"], max(node.born, self._resumed)
        others = {*(hosts if node.rank == 0 else hosts[:1])} - {node.host} if node.about["port"] else ()
        return {host for host in others if now - max(self._links.heard.get(host, 0.0), first) > seconds}

    def _cut_off(self, node: Node, now: float) -> bool:
        """Whether a host is silent, as one with a slow disk is not, and no rank here moves, for longer than a step."""
        most = max(node.about["timeout_seconds"], SILENT) + BEAT_PERIOD
        moved = max(record.words[flight.CHANGED] for record in node.records.values()) / 1e9
        return now - moved > most and bool(self._silent(node, now, most) & self._links.heard.keys())

    def _warn_of_silence(self, node: Node, now: float) -> None:
        silent = {f"of rank {rank}" for rank in node.records if rank != node.rank and node.silent(rank)}
        silent |= {f"on {node.about['hosts'][host]}" for host in self._silent(node, now, SILENT)}
        for who in sorted(silent - self._warned):
            self._say(f"warning: the supervisor {who} has been silent for {SILENT:g} s; its ranks may train on")
        self._warned = silent

    def _end(self, now: float) -> None:
        about = self._node.about if self._node else self._record.told("about") or {}
        if self._verdict and 0 < self._speak <= now:
            self._speak, text = 0.0, f"error: {self._verdict['text']}"
            if self._verdict["hang"]:  # the log has it, with the stacks
                self._say(text, kept=False)
            elif self._verdict["again"] or not (self._record.told("cause") or {}).get("echo"):  # or the trainer does
                self._say(text)
        if self._status is None:
            self._end_trainer(about, now)
        elif self._may_leave(now):
            self._leave(about)

    def _end_trainer(self, about: Message, now: float) -> None:
        finish, saving = about.get("finish_seconds", 0.0), self._record.words[flight.SAVING] != 0
        gone = about.get("launcher") in _LAUNCHERS and os.getppid() != self._launcher
        if gone and self._record.words[flight.TRAINER] and not self._orphaned:
            self._orphaned, self._deadline = True, now + finish + LEAVE
            self._kill(signal.SIGTERM)
            self._say(f"warning: {about['launcher']} is gone; rank {about['rank']} saves and stops")
        if self._verdict is not None and not self._undecided and not self._ending:
            self._ending = True
            soon = self._verdict["hang"] or self._verdict["again"] or (self._node and self._node.early)
            wait = finish if saving and self._verdict["commits"] and not self._verdict["again"] else 0.0
            self._deadline = now + max(wait, 0.0 if soon else LEAVE)
            if wait and self._node:
                self._say(f"the save under way may take up to {finish:g} s more")
        if self._deadline and (now >= self._deadline or (self._verdict and self._verdict["hang"] and not saving)):
            self._kill(signal.SIGKILL)  # who makes the next one is left alone
            self._killed = self._killed or now
            if now - self._killed > REPLACED:  # it is in a call of the kernel that does not return
                self._leave(about)

    def _may_leave(self, now: float) -> bool:
        """Whether the others know all that this supervisor knows."""
        cause, verdict = self._record.told("cause"), self._verdict
        if verdict["again"] if verdict else cause is None:  # taken away a moment ago: the next generation begins
            return False
        if cause is None or cause["status"] in _NORMAL:
            return True
        if self._node is None:
            return now - self._left > MEET or not self._siblings.expected or verdict is not None
        return len(self._node.hosts) == 1 or not (self._speak or (verdict is None and now - self._left < 2 * ECHO))

    def _leave(self, about: Message) -> NoReturn:
        """With the trainer's status, or by its signal; where the run was ended, with the status of that."""
        cause = self._record.told("cause") or {"status": 1, "text": "it did not leave"}
        verdict, status = self._verdict, 1 if self._status is None else os.waitstatus_to_exitcode(self._status)
        another = status == -signal.SIGKILL and verdict is not None and verdict["rank"] != about.get("rank", -1)
        if verdict is not None and (another or verdict["hang"]):
            status = cause["status"] if cause["status"] in _NORMAL else verdict["status"]  # it had done all it had to
        if self._node is not None:
            self._write_exit(self._node, status, verdict, cause)
        elif status < 0:
            name = f"rank {about['rank']} ({about['host']})" if about else "the trainer"
            self._say(f"error: {name} was {cause['text']}")
        self._links.send({"end": status if status >= 0 else FAILED})
        self._keeper.leave(status)
        if status < 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if -status not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status if status >= 0 else 128 - status)  # no signal of its own ends the first process of a container

    def _write_exit(self, node: Node, status: int, verdict: Message | None, cause: Message) -> None:
        if self._writer.is_alive():
            self._writer.join(1.0)
        if not self._writer.is_alive():
            self._write_status(node)
        instead = node.leader and not self._links.sockets() and not (node.folder / "exit.json").exists()
        if status == 2 or not (node.rank == 0 or (verdict and instead)):
            return
        first = verdict or {"status": status, "rank": 0, "text": cause["text"]}
        node.write_exit(first["status"] if status < 0 else status, first["rank"], first["text"])

    def _write_status(self, node: Node) -> None:
        waiting, members = self._links.waiting(), self._members
        node.write_status({"waiting": waiting, "lost": members.lost()} if members else {})
        if self._goodput is not None:
            self._goodput.write()

    def _say(self, text: str, *, aloud: bool = True, kept: bool = True) -> None:
        """On standard error, and in the log of this rank and run.log: who decides may not be the root."""
        if aloud:
            with suppress(OSError):
                os.write(2, f"{time.strftime('%H:%M:%S')} {text}\n".encode())
        for file in self._node.logs if self._node and kept else ():
            with suppress(OSError), open(file, "ab") as opened:
                opened.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())

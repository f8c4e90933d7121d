"""The ledger: what attempts at a run leave behind, what of it counts, and the publication.

Owns everything under `runs/RUN_ID` but the rows themselves: attempts, read notes, receipts, the manifest, `_SUCCESS` and
`latest.json`. Plain files through `storage`, no Ray; what receipts add up to is `accounts.py`'s, who may act `lock.py`'s.

    _work/fingerprint.json      what the run is of
    _work/chain/NNNNNNNN.json   the drivers of this run, one after another, and the commit as the last entry
    _work/ATTEMPT/taken.json    the receipts and notes of earlier attempts that count, frozen when this one began
    _work/ATTEMPT/reads|receipts|engines, manifest.json, config.yaml

A row with a receipt is done for good. An attempt that begins freezes what earlier ones left; what their tasks, which outlive a
killed driver by two seconds, add later has no receipt that counts and is swept away.
"""

import json
import logging
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from scoring.accounts import PartFile, ReadNote, Receipt
from scoring.errors import FingerprintError, LockError
from scoring.lock import LEASE_S, Chain, Hold
from scoring.steps import step
from scoring.storage import exists, is_local, join, list_names, read_bytes, remove_tree, replace, write_bytes

logger = logging.getLogger(__name__)

MANIFEST_VERSION = 1
PART_KINDS = ("scores", "quarantine")
# In an attempt's folder for as long as its tasks may write.
_OPEN = "open"
_TAKEN = "taken.json"
_COMMIT = "commit"
# What single actors leave beside decisions: why one could not begin; and why what it scored, and so what all of them did,
# does not count.
REFUSED, SPOILED, TAKEOVER = "refused-", "spoiled-", "takeover-"
# Receipts are small files: on an object store each is a request.
_READ_THREADS = 16


@dataclass(frozen=True)
class Taken:
    """What an attempt starts from: receipts that count, and what earlier attempts found in shards, by index."""

    receipts: tuple[Receipt, ...] = ()
    notes: Mapping[int, ReadNote] = field(default_factory=dict)

    def to_json(self) -> str:
        notes = {index: asdict(note) for index, note in self.notes.items()}
        return json.dumps({"receipts": [asdict(item) for item in self.receipts], "notes": notes})

    @classmethod
    def from_json(cls, text: str) -> "Taken":
        data = json.loads(text)
        return cls(tuple(Receipt.from_dict(item) for item in data["receipts"]), _notes(data["notes"]))


def _notes(data: Mapping[str, Mapping[str, Any]]) -> dict[int, ReadNote]:
    return {int(index): ReadNote(**note) for index, note in data.items()}


@dataclass(frozen=True)
class AttemptFolder:
    """Where one attempt at a run leaves its parts, read notes and receipts; their names carry the attempt."""

    run_uri: str
    attempt: str

    # --- for its tasks

    @property
    def is_open(self) -> bool:
        """Whether this attempt's tasks may still write: not once another attempt has begun, or the run is published."""
        return exists(join(self._work_uri, _OPEN))

    def write_part(self, kind: str, task: int, data: bytes) -> str:
        """Put one part of `kind` (scores or quarantine); returns its path relative to the run folder."""
        path = f"{kind}/part-{self.attempt}-{task:06d}.parquet"
        with step("write_part"):
            write_bytes(join(self.run_uri, path), data)
        return path

    def write_reads(self, first_shard: int, notes: Mapping[int, ReadNote]) -> None:
        """Put one read task's notes, by shard."""
        document = json.dumps({index: asdict(note) for index, note in notes.items()})
        with step("write_reads"):
            replace(join(self._work_uri, "reads", f"{first_shard:08d}.json"), document.encode())

    def write_receipt(self, receipt: Receipt) -> None:
        """Put a write task's receipt, after its parts: a part without a receipt does not count."""
        with step("write_receipt"):
            replace(join(self._work_uri, "receipts", f"{receipt.task:08d}.json"), receipt.to_json().encode())

    @property
    def decisions_uri(self) -> str:
        """Where scoring actors leave their engine decisions, one file a kind of device, and what came of them later."""
        return join(self._work_uri, "engines")

    def journal_uri(self, kind: str) -> str:
        """Where workers of one kind name the rows that they have in hand.

        On the node itself where the run lies in an object store, whose requests would cost more than the rows: a worker that
        dies starts again on its node. The folder above is there for as long as the attempt is (see `Journal`).
        """
        if is_local(self.run_uri):
            return join(self._work_uri, f"journal-{kind}")
        return join(tempfile.gettempdir(), f"multimodal-scorer-{self.attempt}-{kind}")

    # --- for the driver

    @property
    def has_begun(self) -> bool:
        """Whether it has frozen what it starts from: before that it has nothing of its own."""
        return exists(join(self._work_uri, _TAKEN))

    def begin(self, taken: Taken, decisions: Mapping[str, bytes]) -> None:
        """Freeze what it starts from, decisions included, and let its tasks write."""
        for name, document in decisions.items():
            write_bytes(join(self.decisions_uri, name), document)
        with step("take_over"):
            replace(join(self._work_uri, _TAKEN), taken.to_json().encode())
        write_bytes(join(self._work_uri, _OPEN), b"")

    def close(self) -> None:
        """From now on its tasks may not write."""
        remove_tree(join(self._work_uri, _OPEN))

    def decisions(self) -> dict[str, dict[str, Any]]:
        """The engine decisions and later events by file name, less its ending."""
        return {
            name.removesuffix(".json"): json.loads(document) for name, document in sorted(self.decision_files().items())
        }

    def decision_files(self) -> dict[str, bytes]:
        """The same as they lie there."""
        names = [name for name in list_names(self.decisions_uri) if name.endswith(".json")]
        return {name: read_bytes(join(self.decisions_uri, name)) for name in names}

    @property
    def is_spoiled(self) -> bool:
        """Whether rows that its actors scored turned out not to have the reference's scores."""
        return any(name.startswith(SPOILED) for name in list_names(self.decisions_uri))

    @cached_property
    def taken(self) -> Taken:
        """What it started from."""
        return Taken.from_json(read_bytes(join(self._work_uri, _TAKEN)).decode()) if self.has_begun else Taken()

    def own_receipts(self) -> list[Receipt]:
        """The receipts of its own tasks, by task."""
        return [Receipt.from_json(text) for text in self._texts("receipts")]

    def receipts(self) -> list[Receipt]:
        """Every receipt that counts: those it took over and its own."""
        return [*self.taken.receipts, *self.own_receipts()]

    def read_notes(self) -> dict[int, ReadNote]:
        """What was found in shards, from every note that counts."""
        notes = dict(self.taken.notes)
        for text in self._texts("reads"):
            notes |= _notes(json.loads(text))
        return notes

    def remove(self) -> None:
        """Drop its folder; its parts are the sweep's."""
        remove_tree(self._work_uri)

    def keep_manifest(self, manifest: Mapping[str, Any], config_yaml: str) -> None:
        """Put what would be published, where only a commit makes it count."""
        with step("write_manifest"):
            replace(join(self._work_uri, "config.yaml"), config_yaml.encode())
            replace(join(self._work_uri, "manifest.json"), (json.dumps(manifest, indent=1) + "\n").encode())

    def kept(self, name: str) -> bytes:
        """What `keep_manifest` put: config.yaml or manifest.json."""
        return read_bytes(join(self._work_uri, name))

    @property
    def _work_uri(self) -> str:
        return join(self.run_uri, "_work", self.attempt)

    def _texts(self, kind: str) -> list[str]:
        folder = join(self._work_uri, kind)
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            uris = [join(folder, name) for name in sorted(list_names(folder))]
            return [content.decode() for content in pool.map(read_bytes, uris)]


def takes_decisions(uri: str) -> bool:
    """Whether the attempt that a decision's URI belongs to is still there to read it."""
    return exists(join(uri.rpartition("/")[0].rpartition("/")[0], _OPEN))


class RunFolder:
    """One run's place in the output: `OUTPUT/runs/RUN_ID`, and `OUTPUT/latest.json` once published."""

    def __init__(self, output: str, run_id: str, lease_s: float = LEASE_S) -> None:
        self.output = output
        self.run_id = run_id
        self.uri = join(output, "runs", run_id)
        self.chain = Chain(join(self.uri, "_work", "chain"), f"run {run_id}", lease_s)
        self._publishers = Chain(join(output, "_publish"), f"publication below {output}", lease_s)

    @property
    def is_published(self) -> bool:
        return exists(join(self.uri, "_SUCCESS"))

    def read_manifest(self) -> dict[str, Any]:
        """The manifest of a published run."""
        manifest: dict[str, Any] = json.loads(read_bytes(join(self.uri, "manifest.json")))
        return manifest

    def check_fingerprint(self, digest: str, differences: Callable[[dict[str, str]], list[str]]) -> None:
        """Raise FingerprintError when the folder holds a run of something else.

        `differences` turns the stored parts into lines that name each difference.
        """
        stored = self._stored_fingerprint()
        if stored is not None and stored["digest"] != digest:
            raise FingerprintError(
                "\n".join(
                    [
                        f"run.id: {self.run_id} at {self.uri} is a run of something else; choose another --run-id, or drop it",
                        *differences(stored["parts"]),
                    ]
                )
            )

    def hold(self) -> Hold | None:
        """Become the run's driver; None where the run is committed already and `finish` is all there is to do.

        Raises LockError where another driver lives.
        """
        last = self.chain.tail()
        if last is not None and _COMMIT in last.document:
            return None
        with step("hold"):
            return self.chain.acquire()

    def claim(self, digest: str, parts: Mapping[str, str], differences: Callable[[dict[str, str]], list[str]]) -> None:
        """Claim the run for a fingerprint, as its holder. Raises FingerprintError, see `check_fingerprint`."""
        self.check_fingerprint(digest, differences)
        if self._stored_fingerprint() is None:
            document = json.dumps({"digest": digest, "parts": dict(parts)}).encode()
            # In one put: half a file, left by a killed driver, would stop every rerun.
            with step("claim"):
                replace(join(self.uri, "_work", "fingerprint.json"), document)

    def attempts(self) -> list[AttemptFolder]:
        """What drivers left of this run, oldest first."""
        names = [name for name in list_names(join(self.uri, "_work")) if not name.endswith(".json") and name != "chain"]
        return [AttemptFolder(self.uri, name) for name in sorted(names)]

    def begin(self, hold: Hold, *, decides_anew: bool = False, first: Callable[[], Taken] = Taken) -> AttemptFolder:
        """A new attempt, from what earlier ones left; their tasks may not write any more, and what does not count is gone.

        It scores with the engine that was decided on before, so that a run's scores come from one, unless `decides_anew`. The
        run's first attempt starts from what `first` gives.
        """
        hold.check()
        earlier = self.attempts()
        for attempt in earlier:
            attempt.close()
        last = next((attempt for attempt in reversed(earlier) if attempt.has_begun), None)
        if last is not None and last.is_spoiled:
            logger.warning(
                "run %s: scores of attempt %s are not the reference's; all rows are scored anew",
                self.run_id,
                last.attempt,
            )
            last = None
        taken = Taken(tuple(last.receipts()), last.read_notes()) if last else first()
        decisions = {} if last is None or decides_anew else _settled_decisions(last)
        serial = sum(attempt.attempt.startswith(f"{hold.number:08d}-") for attempt in earlier)
        new = AttemptFolder(self.uri, f"{hold.number:08d}-{serial}-{secrets.token_hex(4)}")
        new.begin(taken, decisions)
        if taken.receipts:
            rows = sum(file.rows for receipt in taken.receipts for file in receipt.files)
            logger.info("run %s: %d rows are done already; the rest is scored", self.run_id, rows)
        for attempt in earlier:
            attempt.remove()
        self._sweep([file for receipt in taken.receipts for file in receipt.files])
        return new

    def _sweep(self, counted: Sequence[PartFile]) -> None:
        """Remove parts that no receipt names: of attempts that lost, or of tasks that were killed before their receipt."""
        wanted = {file.path for file in counted}
        with step("sweep"):
            for kind in PART_KINDS:
                for name in list_names(join(self.uri, kind)):
                    if f"{kind}/{name}" not in wanted:
                        remove_tree(join(self.uri, kind, name))

    def _stored_fingerprint(self) -> dict[str, Any] | None:
        if self.is_published:
            stored: dict[str, Any] = self.read_manifest()["fingerprint"]
            return stored
        uri = join(self.uri, "_work", "fingerprint.json")
        return json.loads(read_bytes(uri)) if exists(uri) else None

    def commit(self, hold: Hold, attempt: AttemptFolder, manifest: Mapping[str, Any], config_yaml: str) -> None:
        """Decide that this attempt is the run, then publish it. Raises LockError where another driver has taken over.

        The commit is the chain's next entry: a driver that was taken over finds that place taken.
        """
        attempt.close()
        attempt.keep_manifest(manifest, config_yaml)
        with step("commit"):
            if not self.chain.append(hold.number, {_COMMIT: attempt.attempt}):
                hold.check()
                raise LockError(f"run {self.run_id}: its chain is gone; run the same command again")
        hold.end()
        self.finish()

    def finish(self) -> None:
        """Publish what was committed: manifest and configuration, `_SUCCESS`, `latest.json`, then drop `_work`.

        Each step is one put, in this order, and may be done again: a rerun mends a publication that was cut off. Nothing to
        do once `_work` is gone, so that a rerun of an old run leaves a newer `latest.json` be.
        """
        if not exists(join(self.uri, "_work")):
            return
        publisher = self._publishers.acquire(waits=True)
        try:
            self._publishers.forget_before(publisher.number)
            if not exists(join(self.uri, "_work")):
                return  # another process has finished it meanwhile
            last = self.chain.tail()
            if not self.is_published:
                if last is None or _COMMIT not in last.document:
                    return  # nothing was committed
                self._publish(AttemptFolder(self.uri, last.document[_COMMIT]))
            latest = {"run_id": self.run_id, "manifest": f"runs/{self.run_id}/manifest.json"}
            with step("publish_latest"):
                replace(join(self.output, "latest.json"), (json.dumps(latest) + "\n").encode())
            with step("drop_work"):
                remove_tree(join(self.uri, "_work"))
        finally:
            publisher.release()

    def _publish(self, attempt: AttemptFolder) -> None:
        manifest = attempt.kept("manifest.json")
        with step("publish_config"):
            replace(join(self.uri, "config.yaml"), attempt.kept("config.yaml"))
        with step("publish_manifest"):
            replace(join(self.uri, "manifest.json"), manifest)
        self._sweep([PartFile(**file) for file in json.loads(manifest)["files"]])
        with step("publish_success"):
            replace(join(self.uri, "_SUCCESS"), b"")


def _settled_decisions(attempt: AttemptFolder) -> dict[str, bytes]:
    """An attempt's decisions, less what became of single actors."""
    return {
        name: document
        for name, document in attempt.decision_files().items()
        if not name.startswith((REFUSED, SPOILED, TAKEOVER))
    }

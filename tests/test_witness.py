"""Rows of the sample that pass in the run are held against the reference: what is found, and what of the run then counts."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest

from scoring import pipeline
from scoring.accounts import ReadNote
from scoring.errors import ParityError
from scoring.ledger import RunFolder, Taken
from scoring.storage import join, write_bytes
from scoring.witness import Witness
from tests.test_ledger import started, write

FILES = ["a", "b", "b", "c"]
ROWS = [5, 0, 7, 2]


class Probabilities:
    """Logits as they are."""

    def comparable(self, logits: Any) -> Any:
        return logits


def table_of(rows: list[tuple[str, int]]) -> pa.Table:
    files, numbers = zip(*rows, strict=True)
    return pa.table({"source_file": pa.array(files), "source_row": pa.array(numbers, pa.int64())})


def scores_of(values: list[float]) -> Any:
    return np.array([[value, 1 - value] for value in values], dtype=np.float32)


def witness(find_reference: Any = lambda: scores_of([0.1, 0.2, 0.3, 0.4])) -> Witness:
    return Witness(table_of(list(zip(FILES, ROWS, strict=True))), cast("Any", Probabilities()), 0.005, find_reference)


WINDOW = table_of([("b", 6), ("b", 7), ("a", 7), ("c", 2), ("a", 5), ("d", 5)])
# Two rows have no score; the others come in the batches' order.
SCORED = np.array([4, 1, 0, 5])


def test_rows_of_the_sample_are_found_by_file_and_number_wherever_they_pass() -> None:
    found, known = witness()._among(WINDOW, SCORED)
    assert dict(zip(found.tolist(), known.tolist(), strict=True)) == {0: 0, 1: 2}, "c 2 has no score"
    witness().check(WINDOW, SCORED, scores_of([0.109, 0.291, 0.9, 0.9]), "cuda-fp16")
    witness().check(table_of([("d", 1)]), np.array([0]), scores_of([0.9]), "cuda-fp16")


@pytest.mark.parametrize(
    ("values", "text"),
    [([0.1, 0.289], r"up to 1\.10e-02"), ([0.6, 0.3], "1 other labels"), ([float("nan"), 0.3], "1 not finite")],
)
def test_scores_that_are_not_the_references_end_the_run(values: list[float], text: str) -> None:
    with pytest.raises(ParityError, match=rf"cuda-fp16 passed alone.*{text}"):
        witness().check(WINDOW, SCORED, scores_of([*values, 0.9, 0.9]), "cuda-fp16")


def test_without_a_reference_nothing_is_checked_which_is_said(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def fail() -> Any:
        asked.append(1)
        raise RuntimeError("upstream refused a cell")

    without = witness(fail)
    for _ in range(2):
        without.check(WINDOW, SCORED, scores_of([0.9] * 4), "cuda-fp16")
    assert len(asked) == 1
    assert "rows are not checked as they pass: RuntimeError: upstream refused a cell" in caplog.text


def test_nothing_that_a_spoilt_attempt_scored_or_took_over_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = RunFolder(str(tmp_path), "r1")
    hold = started(run)
    first = run.begin(hold)
    write(first, 0, (0, 5))
    hold.release()
    hold = started(run)
    second = run.begin(hold)
    write(second, 1, (5, 9))
    second.write_reads(0, {0: ReadNote(40)})
    write_bytes(join(second.decisions_uri, "H100.json"), b'{"provider": "cuda"}')
    document = b'{"error": "ParityError", "message": "differs in the run"}'
    write_bytes(join(second.decisions_uri, "spoiled-ab.json"), document)
    with pytest.raises(ParityError, match="differs in the run"):
        pipeline._raise_refusal(second, RuntimeError("the actor's task failed"))
    hold.release()
    third = run.begin(started(run))
    assert "are not the reference's; all rows are scored anew" in caplog.text
    assert (third.taken, third.receipts(), third.decisions()) == (Taken(), [], {})

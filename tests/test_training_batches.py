"""Rows as batches: nothing is learned but what should be, and the head on a few columns gives the loss of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collegium.training.recipes import Row
from collegium.training.tuning.batches import IGNORED, Collator, answer_loss, features, order, padding

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 12), st.integers(1, 16), st.integers(0, 9))
def test_every_row_comes_as_often_as_any_other(lengths: list[int], steps: int, batch: int, seed: int) -> None:
    ordered = order(lengths, steps, batch, seed)
    assert len(ordered) == steps * batch
    counts = [ordered.count(at) for at in range(len(lengths))]
    assert max(counts) - min(counts) <= 1
    assert ordered == order(lengths, steps, batch, seed)


@given(LENGTHS, st.integers(1, 9))
def test_rows_of_like_length_share_a_batch(lengths: list[int], batch: int) -> None:
    ordered = order(lengths, -(-len(lengths) // batch), batch, 17)
    sizes = [[lengths[at] for at in ordered[start : start + batch]] for start in range(0, len(ordered), batch)]
    assert all(size == sorted(size) for size in sizes)
    longest, shortest = max(sizes), min(sizes)
    assert all(max(one) <= min(other) or max(other) <= min(one) for one in sizes for other in sizes if one is not other)
    assert longest >= shortest


def test_sorting_spares_padding_and_batches_come_in_no_order() -> None:
    lengths = [10 + at % 90 for at in range(900)]
    ordered = [lengths[at] for at in order(lengths, 90, 10, 17)]
    assert padding(lengths, 10) < padding(sorted(lengths)[::2] + sorted(lengths)[1::2], 1000)
    assert padding(ordered, 10) < 0.05 < padding([10, 100] * 9, 2)
    assert padding([7, 7, 7], 2) == 0
    assert ordered != sorted(ordered)


def batch_of(*rows: Row) -> dict[str, Any]:
    return Collator(0)([features(row) for row in rows])


def test_columns_are_those_that_a_learned_token_follows() -> None:
    batch = batch_of(Row((1, 2, 3), (4, 5)), Row((6,), (7,)), Row((), (8, 9, 10)))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [0, 0, 0, 6, 7], [0, 0, 8, 9, 10]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    assert batch["logits_to_keep"].tolist() == [1, 2, 3]
    # The third row's first token follows nothing.
    assert batch["labels"].tolist() == [[IGNORED, 4, 5], [IGNORED, IGNORED, 7], [IGNORED, 9, 10]]


def test_tokens_that_are_not_learned_have_no_label() -> None:
    batch = batch_of(Row((1,), (2, 3, 4), (True, False, True)))
    assert batch["labels"].tolist() == [[2, IGNORED, 4]]
    with pytest.raises(ValueError, match="zip"):
        features(Row((1,), (2, 3), (True,)))


TOKENS = st.lists(st.integers(3, 200), min_size=1, max_size=9).map(tuple)
ROWS = st.lists(st.builds(Row, prompt=TOKENS, answer=TOKENS), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)  # its `eval` has no types
    return model.eval()


@given(rows=ROWS)
@settings(max_examples=20)
def test_the_loss_is_that_of_each_row_by_itself(model: Any, rows: list[Row]) -> None:
    import torch

    batch = batch_of(*rows)
    with torch.inference_mode():
        labels = batch.pop("labels")
        together = answer_loss(model(**batch), labels)
        alone = 0.0
        for row in rows:
            ids = torch.tensor([[*row.prompt, *row.answer]])
            logprobs = model(ids).logits[0].log_softmax(-1)
            alone -= sum(float(logprobs[len(row.prompt) + at - 1, token]) for at, token in enumerate(row.answer))
        count = sum(len(row.answer) for row in rows)
        accumulated = answer_loss(model(**batch), labels, 2 * count)
    assert float(together) == pytest.approx(alone / count, rel=1e-4)
    assert float(accumulated) == pytest.approx(alone / count / 2, rel=1e-4)


def test_a_batch_of_which_nothing_is_learned_costs_nothing(model: Any) -> None:
    import torch

    batch = batch_of(Row((1,), (2, 3), (False, False)))
    labels = batch.pop("labels")
    with torch.inference_mode():
        assert float(answer_loss(model(**batch), labels)) == 0
        assert float(answer_loss(model(**batch), labels, torch.tensor(0))) == 0

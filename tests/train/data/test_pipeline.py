"""Batches in order: the same for every number of hosts, resumed at any place, by the weights of the sources."""

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ministral_jax.errors import MinistralError
from tests.tokenizers import tokenizer
from tests.train.data.lines import PAIR, TOOLS, WHOLE_PAIR
from train.data.config import DataConfig
from train.data.pipeline import open_data
from train.data.preferences import open_pairs

KIND = "tiny-v13"
SEQ_LEN = 64


def write_chats(path: Path, first: int, count: int, letter: str = "a") -> Path:
    """Conversations of different lengths; the answer of line i spells i."""
    lines = []
    for number in range(first, first + count):
        question = {"role": "user", "content": "x" * (1 + number * 7 % 15)}
        answer = {"role": "assistant", "content": f"{letter}{number}" + "." * (number * 5 % 23)}
        lines.append(json.dumps({"messages": [question, answer]}) + "\n")
    path.write_text("".join(lines))
    return path


def data_config(**fields) -> DataConfig:
    """A config that is quick for few lines: nothing read ahead, and no shuffling, which takes Grain long for so few."""
    return DataConfig(**{"read_threads": 0, "shuffle": False} | fields)


def opened(config: DataConfig, **options):
    return open_data(config, tokenizer(KIND), **{"seq_len": SEQ_LEN, "batch_size": 4, "seed": 3} | options)


def answers(batch) -> list[str]:
    """What the trained tokens of each segment spell, row by row."""
    told = []
    for row in range(len(batch.targets)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            here = (batch.segment_ids[row] == segment) & (batch.loss_weights[row] > 0)
            told.append(tokenizer(KIND).decode(batch.targets[row][here].tolist()).rstrip("."))
    return told


def same(one, other) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    write_chats(folder / "a.jsonl", 0, 17)
    write_chats(folder / "b.jsonl", 100, 6)
    return folder


CONFIGS = {
    "first fit": DataConfig(packing_window=3, read_threads=2),
    "cut and continue": data_config(packing="mistral-finetune"),
    "one each": data_config(packing="none", long="drop"),
    "three passes": data_config(packing_window=3, epochs=3, shuffle=True),
    "evaluation": data_config(packing_window=3).for_evaluation(),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_resuming_at_every_batch_equals_going_on(chats, name):
    config = dataclasses.replace(CONFIGS[name], instruct_data=f"{chats / 'a.jsonl'}:2,{chats / 'b.jsonl'}")
    batches, expected = opened(config), []
    states = [json.loads(json.dumps(batches.state()))]
    for _ in range(8):
        expected.append(next(batches, None))
        states.append(json.loads(json.dumps(batches.state())))
    for place, batch in enumerate(expected):  # each place leads to the batch and the state that followed it
        again = opened(config)
        again.restore(states[place])
        found = next(again, None)
        assert found is None if batch is None else found is not None and same(found, batch)
        assert again.state() == states[place + 1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_get_their_rows_of_one_global_batch(chats, name, hosts):
    config = dataclasses.replace(CONFIGS[name], instruct_data=str(chats))
    whole = opened(config)
    parts = [opened(config, process_index=host, process_count=hosts) for host in range(hosts)]
    for _ in range(4):
        batch, shares = next(whole, None), [next(part, None) for part in parts]
        assert all(part.state() == whole.state() for part in parts)
        if batch is None:
            assert shares == [None] * hosts
        else:
            assert same([np.concatenate(arrays) for arrays in zip(*shares, strict=True)], batch)


def test_a_state_of_two_hosts_continues_on_one(chats):
    config = data_config(instruct_data=str(chats))
    hosts = [opened(config, process_index=host, process_count=2) for host in range(2)]
    whole = opened(config)
    for batches in (*hosts, whole):
        next(batches)
    alone = opened(config)
    alone.restore(hosts[1].state())
    assert same(next(alone), next(whole))


def test_every_pass_draws_every_line_once_in_another_order(chats):
    config = data_config(instruct_data=str(chats), packing="none", epochs=3, shuffle=True)
    told = [answer for batch in opened(config, batch_size=23) for answer in answers(batch)]
    passes = [told[:23], told[23:46], told[46:]]
    assert all(sorted(one) == sorted(passes[0]) and len(set(one)) == 23 for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_the_seed_decides_the_order(chats):
    def told(seed: int) -> list[str]:
        return answers(next(opened(data_config(instruct_data=str(chats), shuffle=True), seed=seed)))

    assert told(3) == told(3) != told(4)


def test_evaluation_goes_once_through_the_files_in_order_and_pads_the_last_batch(chats):
    config = data_config(instruct_data=f"{chats / 'b.jsonl'}:5,{chats / 'a.jsonl'}:1", packing="none").for_evaluation()
    batches = list(opened(config, batch_size=5))
    expected = [f"a{number}" for number in (*range(100, 106), *range(17))]
    assert [answer for batch in batches for answer in answers(batch)] == expected
    last = batches[-1]
    assert last.tokens.shape == (5, SEQ_LEN)
    assert (last.segment_ids[3:] == 0).all()
    assert (last.loss_weights[3:] == 0).all()


def test_weights_are_the_shares_of_the_draws(tmp_path):
    write_chats(tmp_path / "few.jsonl", 0, 4, "f")
    write_chats(tmp_path / "many.jsonl", 0, 40, "m")
    sources = f"{tmp_path / 'few.jsonl'}:3,{tmp_path / 'many.jsonl'}:1"
    batches = opened(data_config(instruct_data=sources, packing="none"))
    drawn = Counter(answer[0] for _ in range(10) for answer in answers(next(batches)))
    assert drawn == {"f": 30, "m": 10}


def test_sources_without_weights_are_one_pool(chats):
    config = data_config(instruct_data=f"{chats / 'a.jsonl'},{chats / 'b.jsonl'}", packing="none", epochs=1)
    told = [answer for batch in opened(config) for answer in answers(batch)]
    assert sorted(told) == sorted(f"a{number}" for number in (*range(17), *range(100, 106)))


def test_pretraining_text_and_conversations_share_batches(chats, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "once upon"}\n{"content": "a time"}\n')
    config = data_config(data=str(tmp_path), instruct_data=str(chats), packing="none", epochs=1)
    told = [answer for batch in opened(config) for answer in answers(batch)]
    assert {"once upon", "a time", "a100"} <= set(told)
    assert len(told) == 25


def test_long_samples_are_cut_or_dropped_and_counted(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 200}]
    hopeless = [{"role": "user", "content": "q" * 200}, {"role": "assistant", "content": "a"}]
    lines = [{"messages": messages}, {"messages": hopeless}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = data_config(instruct_data=str(tmp_path), epochs=1)
    batches = opened(config)
    (batch,) = list(batches)
    assert int((batch.segment_ids > 0).sum()) == SEQ_LEN
    assert (batches.counts.cut, batches.counts.untrained, batches.counts.rows) == (2, 1, 1)
    dropped = opened(dataclasses.replace(config, long="drop"))
    assert list(dropped) == []
    assert dropped.counts.dropped == 2


def test_bad_lines_are_left_out_told_and_counted(tmp_path, caplog):
    path = write_chats(tmp_path / "a.jsonl", 0, 5)
    path.write_text(path.read_text() + '{"messages": [{"role": "me"}]}\n')
    batches = opened(data_config(instruct_data=str(path), packing="none", epochs=2))
    told = [answer for batch in batches for answer in answers(batch)]
    assert Counter(told) == {f"a{number}": 2 for number in range(5)}
    assert batches.counts.bad == 2
    (message,) = caplog.messages
    assert f"{path} line 6: messages[0].role" in message


def test_data_of_bad_lines_alone_is_an_error_and_no_endless_search(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{}\n" * 3)
    with pytest.raises(MinistralError, match="3 lines, and none of them"):
        next(opened(data_config(instruct_data=str(tmp_path))))


def test_prefixes_of_conversations_with_tools_are_samples_of_their_own(tmp_path):
    (tmp_path / "tools.jsonl").write_text(json.dumps(TOOLS) + "\n")
    config = data_config(
        instruct_data=str(tmp_path), tools_trained="last", tool_prefixes=True, packing="none", epochs=1
    )
    batches = opened(config, seq_len=512)
    told = sorted(answer for batch in batches for answer in answers(batch))
    assert told == ["Yes", 'weather{"town": "Oslo"}', 'weather{"town": "Rome"}']


def test_the_fill_rate_is_the_share_of_rows_that_is_no_padding(chats):
    batches = opened(data_config(instruct_data=str(chats), epochs=1))
    filled = [int((batch.segment_ids > 0).sum()) for batch in batches]
    trained = sum(
        int((batch.loss_weights > 0).sum()) for batch in opened(data_config(instruct_data=str(chats), epochs=1))
    )
    assert batches.fill_rate == sum(filled) / (batches.counts.rows * SEQ_LEN)
    assert (batches.counts.tokens, batches.counts.trained) == (sum(filled), trained)


@pytest.mark.parametrize("change", ["content", "seq_len", "seed", "packing"])
def test_a_state_of_other_data_or_options_is_refused(chats, tmp_path, change):
    path = write_chats(tmp_path / "a.jsonl", 0, 9)
    state = opened(data_config(instruct_data=str(path))).state()
    options, config = {}, data_config(instruct_data=str(path))
    if change == "content":
        path.write_text(path.read_text().replace("a3", "a4"))
    elif change == "packing":
        config = dataclasses.replace(config, packing="none")
    else:
        options = {change: 32}
    with pytest.raises(MinistralError, match="data" if change == "content" else change):
        opened(config, **options).restore(state)


def test_a_state_survives_that_the_files_move(tmp_path):
    path = write_chats(tmp_path / "a.jsonl", 0, 9)
    batches = opened(data_config(instruct_data=str(path)))
    next(batches)
    state, expected = batches.state(), next(batches)
    moved = path.rename(tmp_path / "b.jsonl")
    again = opened(data_config(instruct_data=str(moved)))
    again.restore(state)
    assert same(next(again), expected)


def test_pairs_come_row_by_row_and_resume(tmp_path):
    lines = [PAIR, WHOLE_PAIR] * 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = data_config(preference_data=str(tmp_path), shuffle=False, epochs=1)

    def pairs(**options):
        return open_pairs(config, tokenizer(KIND), seq_len=SEQ_LEN, batch_size=4, **options)

    batches = pairs()
    first = next(batches)
    state, second = batches.state(), next(batches)
    assert answers(first) == ["Hello!", "No"] * 4
    assert answers(second) == ["Hello!", "No"] * 2
    assert not second.loss_weights[4:].any()
    again = pairs(process_index=1, process_count=2)
    again.restore(state)
    share = next(again)
    assert same(share, [array[4:] for array in second])
    assert next(batches, None) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 3, "process_count": 2}, "3 rows do not divide among 2"),
        ({"seq_len": 0}, "seq_len"),
        ({"process_index": 1}, "process_index"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(chats, options, reason):
    with pytest.raises(MinistralError, match=reason):
        opened(data_config(instruct_data=str(chats)), **options)


@pytest.mark.parametrize(
    "fields",
    [{"packing": "best"}, {"long": "keep"}, {"epochs": 0}, {"packing_window": 0}, {"tool_prefixes": True}],
)
def test_options_that_are_not_allowed_are_refused(fields):
    with pytest.raises(MinistralError, match=f"data.{next(iter(fields))}"):
        DataConfig(**fields)


def test_without_grain_it_says_what_to_install(chats, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(MinistralError, match="needs grain: pip install"):
        opened(data_config(instruct_data=str(chats)))

"""Documents become rows: every kind of file, templates applied, an order that only the seed decides."""

import json
import sys
import types

import pytest

from nvfp4_runtime.distill.data import indices, load_rows
from nvfp4_runtime.errors import ConfigError
from nvfp4_runtime.text.tokenizer import Tokenizer


def write(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return str(path)


def test_documents_are_joined_and_each_is_ended(teacher, tmp_path):
    source = write(tmp_path / "a.jsonl", {"text": "abc"}, {"prompt": "de", "completion": "f"}, {"text": "ghij"})
    rows = load_rows(source, teacher, 6)
    tokenizer = Tokenizer.load(teacher)
    end = tokenizer.eos_token_ids[0]
    expected = [*tokenizer.encode("abc"), end, *tokenizer.encode("def"), end, *tokenizer.encode("ghij")]
    assert rows.ids.flatten().tolist() == expected


def test_a_line_ends_at_its_newline_and_at_no_other_separator(teacher, tmp_path):
    path, text = tmp_path / "a.jsonl", "a\u2028b\u0085c\x0bd\x1ce"
    path.write_text(
        json.dumps({"text": text}, ensure_ascii=False) + "\n" + json.dumps({"text": "fghi"}), encoding="utf-8"
    )
    tokenizer = Tokenizer.load(teacher)
    end = tokenizer.eos_token_ids[0]
    expected = [*tokenizer.encode(text), end, *tokenizer.encode("fghi"), end]
    assert load_rows(str(path), teacher, 3).ids.flatten().tolist() == expected[: len(expected) // 3 * 3]


def test_messages_are_rendered_by_the_chat_template(teacher, tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    rows = load_rows(write(tmp_path / "a.jsonl", {"messages": messages}), teacher, 4)
    tokenizer = Tokenizer.load(teacher)
    whole = tokenizer.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyou<|im_end|>\n")
    expected = [*whole, tokenizer.eos_token_ids[0]]
    assert rows.ids.flatten().tolist() == expected[: len(expected) // 4 * 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":1 is not JSON"),
        ("[" * 100_000, r":1 is not JSON"),
        ("1" * 5000, r":1 is not JSON"),
        ('{"body": "x"}', r':1: expected \{"text"'),
        ('{"messages": 3}', ":1: expected"),
        ('{"messages": []}', ":1: expected"),
        ('{"messages": [{"content": "x"}]}', ":1: expected"),
        ('{"messages": [{"role": "user", "content": null}]}', ":1: expected"),
        ('{"text": "\\ud800"}', ":1 cannot be tokenised"),
    ],
)
def test_a_line_that_is_no_document_is_named(teacher, tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match=message):
        load_rows(str(path), teacher, 4)


def test_json_is_no_text(teacher, tmp_path):
    (tmp_path / "a.json").write_text('{"text": "abc"}')
    with pytest.raises(ConfigError, match=r"expected plain text, or \.jsonl"):
        load_rows(str(tmp_path / "a.json"), teacher, 4)


def test_a_dataset_s_faults_are_named(teacher, monkeypatch):
    def load(name, split):
        if name == "broken":
            raise RuntimeError("no such thing")
        return [{"text": "abc"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    with pytest.raises(ConfigError, match=r"has no column 'body'; it has text"):
        load_rows("hf:good:train:body", teacher, 4)
    with pytest.raises(ConfigError, match="cannot be loaded: RuntimeError: no such thing"):
        load_rows("hf:broken", teacher, 4)


def test_a_dataset_without_its_package_is_refused_with_the_remedy(teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"needs the package datasets.*nvfp4-runtime\[train\]"):
        load_rows("hf:name", teacher, 4)


def test_the_stream_of_rows_visits_each_once_per_pass_in_an_order_of_the_seed():
    first = indices(0, 7, 7, seed=3)
    assert sorted(first) == list(range(7))
    assert indices(0, 20, 7, seed=3)[:7] == first
    assert indices(5, 4, 7, seed=3) == indices(0, 9, 7, seed=3)[5:]
    assert sorted(indices(7, 7, 7, seed=3)) == list(range(7))
    assert indices(0, 7, 7, seed=4) != first


def test_held_out_rows_are_not_trained_on(teacher, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(map(chr, range(97, 123))) * 8)
    rows, held = load_rows(str(path), teacher, 10).split(5)
    assert len(rows) + len(held) == 20
    assert len(held) == 5

"""Templates under transformers' conventions, in a sandbox with bounds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nvfp4_runtime.errors import InvalidParameterError, UnsupportedFormatError
from nvfp4_runtime.text import chat_template, template_limits
from nvfp4_runtime.text.chat_template import ChatTemplate
from nvfp4_runtime.text.processor import TextProcessor

HI = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[dict[str, str]] | None = None, **options: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages or HI, **options)  # type: ignore[arg-type]


def test_blocks_are_trimmed_and_stripped_as_in_transformers() -> None:
    source = "{% for m in messages %}\n    {% if true %}\n{{ m['content'] }}\n    {% endif %}\n{% endfor %}\n"
    assert render(source) == "Hi\n"


def test_conventions_agree_with_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{{ bos_token }}{%- for m in messages %}\n  {%- if loop.first %} first {% endif %}\n"
        "{{ m | tojson }}{{ {'b': [1, 'é<'], 'a': none} | tojson(indent=2) }}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% if not loop.last %}{% continue %}{% endif %}{% endfor %}{{ tools is none }}"
    )
    messages = [{"role": "user", "content": "a & b"}, {"role": "assistant", "content": "<c>"}]
    theirs, _ = render_jinja_template(conversations=[messages], chat_template=source, bos_token="<s>")
    assert render(source, messages, add_generation_prompt=False) == theirs[0]


def test_dates_and_refusals_are_available_to_templates() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render("{{ strftime_now('%Y-%m-%d') }}"))
    with pytest.raises(InvalidParameterError, match="no system role") as caught:
        render("{{ raise_exception('no system role') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}",
     "{{ (strftime_now.__globals__)['json'] }}", "{% for i in range(999999999) %}x{% endfor %}", "{{ 1/0 }}",
     "{{ nothing.at.all }}", "{{ messages[5].content.x }}", "{% include '/etc/passwd' %}"],
)  # fmt: skip
def test_templates_cannot_leave_the_sandbox_or_fail_otherwise_than_as_a_400(source: str) -> None:
    with pytest.raises(InvalidParameterError):
        render(source)


def test_runaway_templates_end_at_a_size_and_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "{% for i in range(9999) %}{% for j in range(9999) %}xxxxxxxxxx{{ j }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 100_000)
    with pytest.raises(InvalidParameterError, match="more than 100000 characters"):
        render(endless)
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1 << 40)
    monkeypatch.setattr(template_limits, "MAX_RENDER_SECONDS", 0.05)
    with pytest.raises(InvalidParameterError, match="took longer"):
        render(endless)


@pytest.mark.parametrize("source", ["{% for %}", "{{ x", "x" * (chat_template.MAX_TEMPLATE_CHARS + 1)])
def test_templates_that_do_not_compile_or_are_too_large_are_refused_at_load(source: str) -> None:
    with pytest.raises(UnsupportedFormatError):
        ChatTemplate(source)


def test_tools_and_documents_reach_the_template() -> None:
    assert (
        render("{{ tools[0].name }}{{ documents[0].text }}", tools=[{"name": "t"}], documents=[{"text": "d"}]) == "td"
    )


def test_named_templates_are_chosen_by_tools() -> None:
    named = ChatTemplate({"default": "plain", "tool_use": "tools"})
    assert named.render(HI) == "plain"
    assert named.render(HI, tools=[{"name": "t"}]) == "tools"


def test_variables_a_client_may_set_exclude_our_own() -> None:
    template = ChatTemplate("{{ messages }}{{ bos_token }}{{ enable_thinking }}{% set x = 1 %}{{ x }}")
    assert template.extra_variables == {"enable_thinking"}


def test_special_tokens_win_over_variables() -> None:
    assert render("{{ bos_token }}", variables={"bos_token": "evil"}) == "<s>"


@pytest.mark.parametrize(("content", "end"), [("Sure", "Sure"), (" Sure, ", "Sure, "), ("a\nb", "a\nb")])
def test_continued_message_is_the_end_of_the_prompt(content: str, end: str) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<end>\n{% endfor %}"
    messages = [{"role": "user", "content": "Sure"}, {"role": "assistant", "content": content}]
    assert render(source, messages, continue_final_message=True).endswith(f"[assistant]{content}")
    trimming = source.replace("m.content", "m.content | trim")
    assert render(trimming, messages, continue_final_message=True).endswith("[assistant]" + end.strip())


def test_message_that_the_template_changed_cannot_be_continued() -> None:
    for content in ("", "abc"):
        with pytest.raises(InvalidParameterError) as caught:
            render(
                "{{ messages[0].content | upper }}", [{"role": "user", "content": content}], continue_final_message=True
            )
        assert caught.value.param == "continue_final_message"


def test_template_file_wins_over_the_tokenizers_configuration(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "old"}))
    old = ChatTemplate.load(tmp_path)
    assert old is not None
    assert old.render(HI) == "old"
    listed = [{"name": "default", "template": "listed"}, {"name": "rag", "template": "rag"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    several = ChatTemplate.load(tmp_path)
    assert several is not None
    assert several.render(HI) == "listed"
    (tmp_path / "chat_template.jinja").write_text("new")
    new = ChatTemplate.load(tmp_path)
    assert new is not None
    assert new.render(HI) == "new"


def test_text_side_of_a_fixture_checkpoint_loads(shared: Path) -> None:
    text = TextProcessor.load(shared / "fixtures" / "modelopt-llama-nvfp4-kvfp8")
    assert text.chat_template is not None
    assert text.chat_template.render(HI) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert text.tokenizer.eos_token_ids

"""Documented turn formats of models whose packaged file carries no chat template."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """template: Jinja, as `apply_chat_template` takes it. end_of_turn: the token that ends an answer."""

    template: str
    end_of_turn: str


GEMMA = ChatFormat(
    template="""\
{{- bos_token -}}
{%- set turns = namespace(preamble='', said=0) -%}
{%- for message in messages -%}
  {%- if message.role in ('system', 'developer') -%}
    {%- if not loop.first -%}{{- raise_exception('only the first message may be a system message') -}}{%- endif -%}
    {%- set turns.preamble = message.content | trim + '\\n\\n' -%}
  {%- else -%}
    {%- set role = {'user': 'user', 'assistant': 'model'}.get(message.role) -%}
    {%- if role != ('user' if turns.said % 2 == 0 else 'model') -%}
      {{- raise_exception('turns must alternate user, assistant, user, ...') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + role + '\\n' + (turns.preamble if turns.said == 0 else '') + message.content | trim + '<end_of_turn>\\n' -}}
    {%- set turns.said = turns.said + 1 -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
""",
    end_of_turn="<end_of_turn>",
)
"""Gemma 1 to 3: https://ai.google.dev/gemma/docs/core/prompt-structure. There is no system role: such text opens the first user turn."""

from __future__ import annotations

import json
import string
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from collegium.router.words import users_words

QUESTION = "What is a tort, and who is liable for it?"
CODE = "def add(a, b):\n    return a + b  # <-- is {this} right?"
PARAMETERS = {"type": "object", "properties": {"path": {"type": "string", "description": 'a "path" \\ of a {file}'}}}
OPENAI = {"type": "function", "function": {"name": "read_file", "description": "Reads.", "parameters": PARAMETERS}}
ANTHROPIC = {"name": "read_file", "description": "Reads a file.", "input_schema": PARAMETERS}
MCP = {"name": "now", "inputSchema": {}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
REACT = """Answer the following questions as best you can. You have access to the following tools:

search: useful for when you need to answer questions about current events

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Final Answer: the final answer to the original input question

Begin!

Question: @@
Thought:"""
STUFF = """Use the following pieces of context to answer the question at the end. If you don't know the answer, just say \
that you don't know, don't try to make up an answer.

Fever is a symptom. Question: does a vaccine help? Answer: yes.

Question: @@
Helpful Answer:"""
HUB = """You are an assistant for question-answering tasks. Use the following pieces of retrieved context to answer the \
question. If you don't know the answer, just say that you don't know.
Question: @@
Context: Fever is a symptom. Question: does a vaccine help?
Answer:"""
LLAMA_INDEX = """Context information is below.
---------------------
Fever is a symptom.
---------------------
Given the context information and not prior knowledge, answer the query.
Query: @@
Answer: """
ONLY = "Answer the question based only on the following context:\nFever is a symptom.\n\nQuestion: @@\n"
ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
@@

### Response:"""
GUANACO = "### Human: Hello!\n### Assistant: How can I help you?\n### Human: @@\n### Assistant:"
CHAT = """The following is a friendly conversation between a human and an AI. The AI is talkative.

Current conversation:
Human: I have a fever.
AI: Drink water.
Human: @@
AI:"""
BUFFER = "System: You are a helpful assistant.\nHuman: @@"
CLINE = """<task>
@@
</task>

<environment_details>
# VSCode Visible Files
main.py
</environment_details>"""
ONE_LINE = "<documents><document>Fever is a symptom.</document></documents><question>@@</question>"
ATTRIBUTES = '<system-reminder priority="high">Use the todo tool.</system-reminder>\n<user_query>\n@@\n</user_query>'


def fenced(value: object) -> str:
    return f"```json\n{json.dumps(value, indent=2)}\n```"


WRAPPINGS = {
    "reminder": "<system-reminder>\nNever mention <this>.\n</system-reminder>\n@@",
    "reminder inline": "@@ <system-reminder>Be brief.</system-reminder>",
    "nested": "<context>Fever. <context>A vaccine.</context> Pain.</context>\n\n@@",
    "context with cut code": "<context>\n```python\nprint(\n</context>\n\n@@",
    "query with attributes": ATTRIBUTES,
    "cline": CLINE,
    "one line": ONE_LINE,
    "tools": "You have access to the following tools:\n<tools>\n[]\n</tools>\n\n@@",
    "openai": f"Available tools:\n{json.dumps([OPENAI])}\n\n@@",
    "anthropic": f"@@\n\n{fenced([ANTHROPIC, MCP])}",
    "one a line": "\n".join(json.dumps(one) for one in (OPENAI, MCP, CALL)) + "\n@@",
    "named": f"{fenced({'tools': [OPENAI]})}\n@@",
    "react": REACT,
    "react that thinks": REACT + " I should search.\nAction: search\nObservation: Question: x",
    "stuff": STUFF,
    "hub": HUB,
    "llama-index": LLAMA_INDEX,
    "only": ONLY,
    "alpaca": ALPACA,
    "alpaca in short": "### Instruction: @@\n### Response:",
    "guanaco": GUANACO,
    "chat": CHAT,
    "buffer": BUFFER,
    "anthropic of old": "\n\nHuman: @@\n\nAssistant:",
    "user": "User: Hello!\nAI: Hello!\nUser: @@",
    "persona": "You are a helpful assistant. You are Qwen2.5, a language model made by a firm.\n\n@@",
}


@pytest.mark.parametrize("wrapping", WRAPPINGS.values(), ids=WRAPPINGS.keys())
@pytest.mark.parametrize("said", [QUESTION, CODE], ids=["question", "code"])
def test_only_the_persons_words_are_left(wrapping: str, said: str) -> None:
    assert users_words(wrapping.replace("@@", said)) == said


def test_an_instruction_and_its_input_belong_together() -> None:
    prompt = "### Instruction:\nSummarise.\n\n### Input:\nThe court held otherwise.\n\n### Response:"
    assert users_words(prompt) == "Summarise.\nThe court held otherwise."
    shots = "### Instruction:\nAdd.\n\n### Response:\n4\n\n" + prompt
    assert users_words(shots) == "Summarise.\nThe court held otherwise."


def test_a_persons_lines_that_look_like_speakers_are_theirs() -> None:
    said = "Why does this fail?\nUser: bob\nSystem: Debian 12"
    assert users_words(f"Human: Hello!\n\nAssistant: Hello!\n\nHuman: {said}\n\nAssistant:") == said


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        CODE,
        "",
        "   ",
        "???",
        "if x<0, y>0, and |x^3| > |y^2|",
        "What does <system-reminder> mean?",
        "Why is <context> never closed?\n<context>",
        "Fix this:\n\n```xml\n<context>\n<question>1</question>\n</context>\n```",
        "Fix this:\n  <tools>\n    <tool/>\n  </tools>",
        "The element <task>a</task> is required.",
        'tools = [{"name": "a", "parameters": {}}]',
        'register({"name": "a", "parameters": {}})',
        '{"name": "run", "parameters": {"rate": 0.1}}\nWhy does it not converge?',
        '{"parameters": [1, 2], "function": "sin"} is what I get',
        '{"name": "a", "parameters": {"type": "object"}\nWhat is missing here?',
        '[{"name": "a", "parameters": {}}, 1]\nIs this a list?',
        "Summarise this chat:\nUser: I want my money back.\nAI: No.\nUser: Why?",
        "Summarise this chat:\nHuman: Hello!\nAssistant: Hello!",
        "User: bob\nPassword: what do I type here?",
        "### Instruction: what is this header for?",
        "You are wrong. A tort is no crime.",
        "You are a lawyer. What is a tort?",
        "You are an AI assistant, aren't you?",
        "Question: what is a tort?\nAnswer: a civil wrong. Is that right?",
        "Here is the context: a fever.\nQuestion: is it bad?",
        "Begin! Question: why?",
    ],
)
def test_what_a_person_may_write_stays(text: str) -> None:
    assert users_words(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "<system-reminder>Be brief.</system-reminder>",
        "<question> ? </question>",
        fenced([OPENAI]),
        json.dumps(OPENAI),
        "Human:\n\nAssistant:",
        REACT.replace("@@", ""),
        "### Instruction:\n### Response:",
        "You are a helpful assistant.",
    ],
)
def test_where_nothing_would_be_left_the_text_is(text: str) -> None:
    assert users_words(text).strip() == text.strip()


def test_a_stage_that_leaves_nothing_does_not_undo_the_others() -> None:
    assert users_words(f"<tools>[]</tools>\n<user_query></user_query> {QUESTION}").endswith(QUESTION)
    assert users_words("<tools>[]</tools>\nYou are a helpful assistant.") == "You are a helpful assistant."


PIECES = [
    *("<context>", "</context>", "<question>", "</question>", "<user_query>", "</user_query>", "<tools a='b'>", "```"),
    *("\nHuman:", "\nAssistant:", "User:", "System:", "### Instruction:", "### Input:", "### Response:", "Begin!"),
    *("You are a helpful assistant. ", "Question: ", "Context: ", "Answer: ", "Thought: ", "\n", " ", "x", "7", "?"),
    *("Use the following pieces of context", "access to the following tools", "Available tools:\n"),
    *("{", "}", "[", "]", '"', "\\", '"parameters"', json.dumps(OPENAI), json.dumps([MCP]), json.dumps(ANTHROPIC)[:-1]),
]
anything = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=30).map("".join)
PLAIN = string.ascii_letters + string.digits + " .,;?!'()\n"
plain = st.text(PLAIN, max_size=80).map(str.strip).filter(lambda text: any(one.isalnum() for one in text))


@given(anything)
@example('"parameters"' + "[" * 100_000 + "]" * 100_000)  # deeper than JSON may be
@example('"parameters" {"a": ' + "9" * 10_000 + "}")  # longer than a number may be
def test_whatever_comes_some_of_its_words_are_left_in_their_order(text: str) -> None:
    left = users_words(text)
    assert bool(left.strip()) == bool(text.strip())
    assert any(one.isalnum() for one in left) == any(one.isalnum() for one in text)
    rest = iter(text)
    assert all(one in rest for one in left if not one.isspace())


@given(plain)
def test_plain_words_stay_as_they_are(text: str) -> None:
    if not text.startswith("You are"):
        assert users_words(text) == text


@given(plain, st.lists(st.sampled_from(["reminder", "reminder inline", "nested", "tools", "openai", "anthropic"])))
def test_wrappings_around_wrappings_come_off(said: str, names: list[str]) -> None:
    text = said
    for name in names:
        text = WRAPPINGS[name].replace("@@", text)
    if not said.startswith("You are"):
        assert users_words(text) == said


UNITS = [
    "<",
    "{",
    "[",
    '"',
    "\\",
    "{}",
    '{"',
    '"\\"',
    "<context>",
    "<context ",
    "<task>x</task>",
    "```\n",
    "Human: x\n",
]
UNITS += [
    "You are an assistant. ",
    "Question: ",
    "### Input:\n",
    "use the following ",
    "Here are tools ",
    " ",
    "\n",
    "a",
]
UNITS += ['{"function":{"name":"a"}} ', '"parameters"   {']


TRIGGERS = '"parameters" use the following context, access to the following tools, Begin!\n'


@pytest.mark.parametrize(("unit", "size"), [("<", 1_000_000), ("{", 1_000_000), *((unit, 200_000) for unit in UNITS)])
def test_time_is_linear_in_the_text(unit: str, size: int) -> None:
    for text in (unit * (size // len(unit)), TRIGGERS + unit * (size // len(unit))):
        begun = time.thread_time()  # of this thread alone, whatever else the machine does
        users_words(text)
        assert time.thread_time() - begun < 3  # a tenth of it; were it quadratic, it would be minutes

"""Programs that ask a model over HTTP, written as their authors would: nothing here knows of
Turnwise but that an endpoint was given."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import threading
import time
from typing import Any

import anthropic
import openai
from turnwise.plugins.agents.program import Endpoint

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
SYSTEM = "tell me more"


def of_openai(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0)


def of_anthropic(endpoint: Endpoint) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=endpoint.anthropic_base_url, api_key=endpoint.api_key, max_retries=0
    )


def questions(endpoint: Endpoint) -> list[str]:
    return [f"hello {endpoint.seed % 97}", "how are you ?", "what do you know ?"]


def chat(endpoint: Endpoint) -> float:
    """Chat Completions, and all that a completion says of itself."""
    client, messages = of_openai(endpoint), [{"role": "system", "content": SYSTEM}]
    words = ""
    for question in questions(endpoint):
        messages.append({"role": "user", "content": question})
        made = client.chat.completions.create(model="policy", messages=messages, logprobs=True)
        choice = made.choices[0]
        assert made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
        assert len(choice.logprobs.content) == made.usage.completion_tokens
        assert all(token.logprob <= 0 for token in choice.logprobs.content)
        assert choice.finish_reason in ("stop", "length")
        messages.append(choice.message.to_dict())
        words += choice.message.content
    return words.count("e") / (1 + len(words))


def chat_stream(endpoint: Endpoint) -> float:
    client, messages = of_openai(endpoint), [{"role": "system", "content": SYSTEM}]
    words = ""
    for question in questions(endpoint):
        messages.append({"role": "user", "content": question})
        reply, usage = "", None
        for chunk in client.chat.completions.create(
            model="policy", messages=messages, stream=True, stream_options={"include_usage": True}
        ):
            usage = chunk.usage or usage
            reply += "".join(choice.delta.content or "" for choice in chunk.choices)
        assert usage.completion_tokens > 0
        messages.append({"role": "assistant", "content": reply})
        words += reply
    return words.count("e") / (1 + len(words))


def responses(endpoint: Endpoint) -> float:
    """Responses, with the whole conversation in every request."""
    client, items, words = of_openai(endpoint), [], ""
    for question in questions(endpoint):
        items.append({"role": "user", "content": question})
        made = client.responses.create(model="policy", instructions=SYSTEM, input=items)
        items += made.output
        words += made.output_text
    return words.count("e") / (1 + len(words))


def responses_stream(endpoint: Endpoint) -> float:
    """Responses, each going on from the one before it."""
    client, previous, words = of_openai(endpoint), None, ""
    for question in questions(endpoint):
        given = {} if previous is None else {"previous_response_id": previous}
        with client.responses.stream(
            model="policy", instructions=SYSTEM, input=question, **given
        ) as events:
            for event in events:
                if event.type == "response.output_text.delta":
                    words += event.delta
                previous = event.response.id if event.type == "response.created" else previous
    return words.count("e") / (1 + len(words))


def messages(endpoint: Endpoint) -> float:
    client, messages, words = of_anthropic(endpoint), [], ""
    for question in questions(endpoint):
        messages.append({"role": "user", "content": question})
        made = client.messages.create(
            model="policy", max_tokens=100, system=SYSTEM, messages=messages
        )
        assert made.usage.input_tokens > made.usage.output_tokens > 0
        messages.append({"role": "assistant", "content": made.content})
        words += "".join(block.text for block in made.content)
    return words.count("e") / (1 + len(words))


def messages_stream(endpoint: Endpoint) -> float:
    client, messages, words = of_anthropic(endpoint), [], ""
    for question in questions(endpoint):
        messages.append({"role": "user", "content": question})
        with client.messages.stream(
            model="policy", max_tokens=100, system=SYSTEM, messages=messages
        ) as events:
            made = events.get_final_message()
        messages.append({"role": "assistant", "content": made.content[0].text})
        words += made.content[0].text
    return words.count("e") / (1 + len(words))


async def awaited(endpoint: Endpoint) -> None:
    """An asynchronous program; it gives no reward."""
    async with openai.AsyncOpenAI(
        base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0
    ) as client:
        await client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": "hello"}]
        )


# What calls tools.


def tools_chat(endpoint: Endpoint) -> dict[str, Any]:
    """A loop over tool calls, as everybody writes it."""
    client = of_openai(endpoint)
    messages: list[Any] = [{"role": "user", "content": "how much is 2 and 3, and 4 and 5 ?"}]
    while True:
        made = client.chat.completions.create(model="policy", messages=messages, tools=[ADD])
        reply = made.choices[0].message
        messages.append(reply)
        if not reply.tool_calls:
            assert made.choices[0].finish_reason in ("stop", "length")
            return {"success": "14" in reply.content}
        assert made.choices[0].finish_reason == "tool_calls"
        for call in reply.tool_calls:
            given = json.loads(call.function.arguments)
            result = str(given["a"] + given["b"])
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


def tools_responses(endpoint: Endpoint) -> bool:
    client = of_openai(endpoint)
    items: list[Any] = [{"role": "user", "content": "how much is 2 and 3, and 4 and 5 ?"}]
    tool = {"type": "function", "strict": False, **ADD["function"]}
    while True:
        made = client.responses.create(model="policy", input=items, tools=[tool])
        items += made.output
        calls = [item for item in made.output if item.type == "function_call"]
        if not calls:
            return "14" in made.output_text
        for call in calls:
            given = json.loads(call.arguments)
            result = str(given["a"] + given["b"])
            items.append(
                {"type": "function_call_output", "call_id": call.call_id, "output": result}
            )


def tools_messages(endpoint: Endpoint) -> bool:
    client = of_anthropic(endpoint)
    messages: list[Any] = [{"role": "user", "content": "how much is 2 and 3, and 4 and 5 ?"}]
    tool = {"name": "add", "input_schema": ADD["function"]["parameters"]}
    tool["description"] = ADD["function"]["description"]
    while True:
        with client.messages.stream(
            model="policy", max_tokens=200, messages=messages, tools=[tool]
        ) as events:
            made = events.get_final_message()
        messages.append({"role": "assistant", "content": made.content})
        uses = [block for block in made.content if block.type == "tool_use"]
        if not uses:
            return "14" in made.content[0].text
        assert made.stop_reason == "tool_use"
        results = [
            {
                "type": "tool_result",
                "tool_use_id": use.id,
                "content": str(use.input["a"] + use.input["b"]),
            }
            for use in uses
        ]
        messages.append({"role": "user", "content": results})


# What forks.


def ask(client: openai.OpenAI, messages: list[Any], **more: Any) -> Any:
    made = client.chat.completions.create(model="policy", messages=messages, **more)
    return made.choices[0].message.to_dict()


def edits(endpoint: Endpoint) -> float:
    """Goes on, then shows its policy a summary in place of what was before, and goes on from that;
    then returns to where it was."""
    client = of_openai(endpoint)
    first = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "hello there"}]
    first += [ask(client, first), {"role": "user", "content": "how are you ?"}]
    first += [ask(client, first)]
    short = [{"role": "system", "content": "the cat sat"}, {"role": "user", "content": "tell me"}]
    short += [ask(client, short), {"role": "user", "content": "more please"}]
    ask(client, short)
    first += [{"role": "user", "content": "what is it ?"}]
    ask(client, first)
    return 1.0


def parallel(endpoint: Endpoint) -> float:
    """Asks several things at a time."""
    client = of_openai(endpoint)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [[{"role": "user", "content": f"what is {i} ?"}] for i in range(4)]
        replies = list(pool.map(lambda messages: ask(client, messages), asked))
    assert len(replies) == 4
    return 1.0


def few_shot(endpoint: Endpoint) -> None:
    """Begins with a conversation that nobody sampled."""
    ask(
        of_openai(endpoint),
        [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "hello there"},
            {"role": "user", "content": "how are you ?"},
        ],
    )


# What goes wrong.


def crashes(endpoint: Endpoint) -> None:
    ask(of_openai(endpoint), [{"role": "user", "content": "hello"}])
    raise RuntimeError("the kettle is broken")


def exits(endpoint: Endpoint) -> None:
    ask(of_openai(endpoint), [{"role": "user", "content": "hello"}])
    raise SystemExit(3)


def never_asks(endpoint: Endpoint) -> None:
    return None


def hangs(endpoint: Endpoint) -> None:
    ask(of_openai(endpoint), [{"role": "user", "content": "hello"}])
    time.sleep(3600)


def hangs_at_once(endpoint: Endpoint) -> None:
    time.sleep(3600)


def odd_outcome(endpoint: Endpoint) -> Any:
    ask(of_openai(endpoint), [{"role": "user", "content": "hello"}])
    return ["a", "list"]


def asks_for_ever(endpoint: Endpoint) -> None:
    client, messages = of_openai(endpoint), []
    while True:
        messages.append({"role": "user", "content": "more"})
        messages.append(ask(client, messages))


AFTERWARDS: list[str] = []


def asks_after_the_end(endpoint: Endpoint) -> float:
    """Leaves a thread behind that goes on to ask."""
    client = of_openai(endpoint)
    ask(client, [{"role": "user", "content": "hello"}])
    ended = threading.Event()

    def later() -> None:
        ended.wait(1.0)
        try:
            ask(client, [{"role": "user", "content": "are you there ?"}])
        except openai.APIStatusError as error:
            AFTERWARDS.append(type(error).__name__)

    threading.Thread(target=later, daemon=True).start()
    return 0.5


def goes_away(endpoint: Endpoint) -> float:
    """Does not wait for an answer, and asks once more."""
    client = of_openai(endpoint)
    messages = [{"role": "user", "content": "hello"}]
    with contextlib.suppress(openai.APITimeoutError):
        ask(client, messages, timeout=0.001)
    return float(bool(ask(client, messages)["content"]))


REFUSALS: list[tuple[str, str]] = []


def refused(endpoint: Endpoint) -> None:
    """Asks for what cannot be honoured, and in the end for what can."""
    client, other = of_openai(endpoint), of_anthropic(endpoint)
    hello = [{"role": "user", "content": "hello"}]

    def note(call: Any) -> None:
        try:
            call()
        except (openai.APIStatusError, anthropic.APIStatusError) as error:
            REFUSALS.append((type(error).__module__.split(".")[0], str(error)))

    note(lambda: ask(client, hello, temperature=0.2))
    note(lambda: ask(client, hello, n=2))
    note(lambda: ask(client, hello, extra_body={"colour": "red"}))
    note(lambda: client.chat.completions.create(model="gpt-5", messages=hello))
    note(lambda: ask(client, [*hello, {"role": "assistant", "content": "I"}]))
    note(lambda: ask(client, []))
    note(lambda: client.embeddings.create(model="policy", input="hello"))
    note(lambda: client.with_options(api_key="no").chat.completions.create(
        model="policy", messages=hello))  # fmt: skip
    note(lambda: client.responses.create(
        model="policy", input="x", previous_response_id="resp_7"))  # fmt: skip
    note(lambda: other.messages.create(
        model="policy", max_tokens=9, messages=hello, stop_sequences=["x"]))  # fmt: skip
    note(lambda: other.messages.create(model="opus", max_tokens=9, messages=hello))
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    note(lambda: ask(client, [{"role": "user", "content": [image]}]))
    ask(client, hello, temperature=1, top_p=1, n=1, user="me", metadata={"a": "b"}, seed=None)


def pass_over(endpoint: Endpoint) -> None:
    client = of_openai(endpoint)
    hello = [{"role": "user", "content": "hello"}]
    client.chat.completions.create(model="gpt-5", messages=hello, temperature=0.2)


def short(endpoint: Endpoint) -> None:
    """Limits a reply."""
    client = of_openai(endpoint)
    hello = [{"role": "user", "content": "hello"}]
    for limit in (3, 1000):
        made = client.chat.completions.create(model="policy", messages=hello, max_tokens=limit)
        assert made.usage.completion_tokens <= limit


def posts(endpoint: Endpoint) -> None:
    """Gives its reward by posting it, part by part."""
    import httpx2

    client = of_openai(endpoint)
    messages: list[Any] = []
    for reward in (0.25, 0.5):
        messages.append({"role": "user", "content": "more"})
        messages.append(ask(client, messages))
        posted = httpx2.post(
            f"{endpoint.anthropic_base_url}/reward",
            json={"reward": reward, "success": reward > 0.4},
            headers={"Authorization": f"Bearer {endpoint.api_key}"},
        )
        assert posted.json() == {"taken": True}


def of_a_task(endpoint: Endpoint) -> bool:
    reply = ask(of_openai(endpoint), [{"role": "user", "content": endpoint.task["question"]}])
    return endpoint.task["answer"] in reply["content"]


# Frameworks.


def openai_agents(endpoint: Endpoint) -> float:
    from agents.models.openai_responses import OpenAIResponsesModel

    return _openai_agents(endpoint, OpenAIResponsesModel)


def openai_agents_chat(endpoint: Endpoint) -> float:
    from agents.models.openai_chatcompletions import OpenAIChatCompletionsModel

    return _openai_agents(endpoint, OpenAIChatCompletionsModel)


def _openai_agents(endpoint: Endpoint, model: Any) -> float:
    from agents import Agent, RunConfig, Runner, function_tool

    @function_tool
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    client = openai.AsyncOpenAI(base_url=endpoint.base_url, api_key=endpoint.api_key, max_retries=0)
    agent = Agent(
        name="adder", instructions=SYSTEM, tools=[add],
        model=model(model=endpoint.model, openai_client=client),
    )  # fmt: skip
    result = asyncio.run(
        Runner.run(
            agent, "how much is 2 and 3 ?", max_turns=5, run_config=RunConfig(tracing_disabled=True)
        )
    )
    return float("5" in str(result.final_output))


def small_agents(endpoint: Endpoint) -> float:
    from smolagents import OpenAIServerModel, ToolCallingAgent, tool

    @tool
    def add(a: int, b: int) -> int:
        """Adds two numbers.

        Args:
            a: one.
            b: the other.
        """
        return a + b

    model = OpenAIServerModel(
        model_id=endpoint.model, api_base=endpoint.base_url, api_key=endpoint.api_key
    )
    agent = ToolCallingAgent(tools=[add], model=model, max_steps=3, verbosity_level=0)
    return float("5" in str(agent.run("How much is 2 and 3?")))

"""An agent as people write them: a loop over tool calls. It knows nothing of who trains it."""

import json


def serve(client, model, instructions, schemas, use, customer):
    """Serves a customer until there is no answer.

    Args:
        client: of OpenAI's SDK.
        model: its name.
        instructions: the system prompt.
        schemas: of the tools.
        use: takes a tool's name and arguments, returns a text.
        customer: takes a reply, returns the next message or None; without one opens the talk.
    """
    opening = {"role": "user", "content": customer(None)}
    messages = [{"role": "system", "content": instructions}, opening]
    while True:
        made = client.chat.completions.create(model=model, messages=messages, tools=schemas)
        reply = made.choices[0].message
        messages.append(reply)
        for call in reply.tool_calls or ():
            try:
                text = use(call.function.name, json.loads(call.function.arguments))
            except Exception as error:
                text = f"Error: {error}"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
        if not reply.tool_calls:
            answer = customer(reply.content)
            if answer is None:
                return
            messages.append({"role": "user", "content": answer})

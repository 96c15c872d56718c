"""Ask, ask many, stream, chat: the built-in model, no download."""

from __future__ import annotations

from llama_infer import Pipeline

pipe = Pipeline("demo")  # or a folder, or a hub id, of a Llama-family checkpoint

# One prompt in, one completion out. Temperature 0 takes the likeliest token.
answer = pipe("为什么要减少污染，保护环境？", max_new_tokens=64, temperature=0)
print(answer.text)
print(f"  ended by {answer.finish_reason!r} after {len(answer.token_ids)} tokens\n")

# A list in, a list out, in order. A parameter may be a list too, one value a prompt.
prompts = ["17+25=?", "Say hello"]
for prompt, completion in zip(prompts, pipe(prompts, temperature=[0, 0.7], top_p=0.9, seed=1), strict=True):
    print(f"{prompt} -> {completion.text}")

# Text as it is made.
print("\nstreamed: ", end="")
for chunk in pipe.stream("Count to five", max_new_tokens=64):
    print(chunk.text, end="", flush=True)
print("\n")

# A conversation remembers.
chat = pipe.chat()
for question in ("My favourite colour is green.", "What is my favourite colour?"):
    print(f"> {question}\n{chat(question, max_new_tokens=64, temperature=0).text}")

# Every parameter, and who set it.
print(f"\n{pipe.explain(temperature=0.2)}")

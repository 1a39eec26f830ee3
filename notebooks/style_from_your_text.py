# %% [markdown]
# # A style from your own text, in five minutes
#
# You have a text: a book, your essays, a folder of notes. A small language model shall write more like it.
# Nothing is trained but a table of counts, and the model stays as it is.
#
# Run the cells from top to bottom, in VS Code or Jupyter (`jupytext --to ipynb style_from_your_text.py`), or run the
# file as a script. It takes five minutes on two cores.

# %%
import os
import textwrap
from pathlib import Path

import torch

from decoding import Policy, StylePrior, generate
from decoding.metrics import distinct_n
from decoding.models import load_model, load_tokenizer

TEXT = os.environ.get("STYLE_TEXT", "king-james")  # yours: a file, a folder, or notes.csv#column
PROMPT = "The captain said"
SHORT = bool(os.environ.get("NOTEBOOK_SHORT"))  # a quick pass through all cells: short texts, and λ is not searched
TOKENS = 8 if SHORT else 60

# %% [markdown]
# ## Learn the style
#
# Any causal model of transformers does. The one here is small and installs as a package.
#
# In mode `"ratio"` the prior asks of each token: how much likelier is it in your text than in what the model writes by
# itself? The model is listened to once for that, which takes a minute.

# %%
model, tokenizer = load_model(), load_tokenizer()
prior = StylePrior(TEXT, mode="ratio", tokenizer=tokenizer, model=model)
print(f"{len(prior.model):,} n-grams of {TEXT}; λ = {prior.lambda_}")

# %% [markdown]
# ## Look at what it learnt
#
# These tokens make most of the difference: frequent in your text, and likelier there than in the model's own. The prior
# pulls towards them.

# %%
nothing = torch.full((1, prior.model.order - 1), -1)  # no context
frequency = prior.model.log_probs(nothing)[0].exp()
pulled = (frequency * prior.log_ratio).topk(40).indices
print(textwrap.fill(" · ".join(tokenizer.decode(token).strip() for token in pulled), 100))

# %% [markdown]
# And it knows how phrases go on. These are the likeliest tokens behind a few words, by your text alone:

# %%
for words in (" of the", " and he", " in the"):
    context = torch.tensor([tokenizer(words, add_special_tokens=False)["input_ids"]])
    following = prior.model.log_probs(context)[0].topk(6).indices
    print(f"…{words} → " + ", ".join(tokenizer.decode(token).strip() for token in following))

# %% [markdown]
# ## Five strengths, side by side
#
# λ is the strength. At 0 nothing happens; the higher, the more of your text. The same seed is used for all.


# %%
def written(processors: list) -> str:
    """What the model writes behind the prompt, with the same random numbers every time."""
    torch.manual_seed(0)
    options = {"max_new_tokens": TOKENS, "do_sample": True, "top_k": 0}
    return generate(model, PROMPT, tokenizer=tokenizer, logits_processor=processors, **options)


def beside(texts: dict[str, str], width: int = 22) -> None:
    """Prints texts in columns."""
    columns = [[name, "-" * width, *textwrap.wrap(" ".join(text.split()), width)] for name, text in texts.items()]
    for line in range(max(map(len, columns))):
        print("  ".join(f"{column[line] if line < len(column) else '':{width}}" for column in columns).rstrip())


texts = {}
for strength in (0.0, 0.3, 0.6, 0.8, 1.0):
    prior.lambda_ = strength
    texts[f"λ = {strength}"] = written([prior])
beside(texts)

# %% [markdown]
# At λ = 0 the text is that of the model alone, character for character:

# %%
assert texts["λ = 0.0"] == written([])
print("λ = 0 changes nothing")

# %% [markdown]
# ## Measure it
#
# Perplexity by your text's n-grams says how near a text is to yours: lower is nearer. distinct-2 is the share of pairs
# of tokens that are not repetitions. A style is no gain if it falls.

# %%
for name, text in texts.items():
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    print(f"{name}: style perplexity {prior.model.perplexity(ids):7.0f}   distinct-2 {distinct_n(ids, 2):.2f}")

# %% [markdown]
# ## Let it choose λ, or set a limit
#
# `λ="auto"` tries eleven strengths, and takes the one whose texts come nearest to a part of your text that was held
# out, while the model still finds them fluent. It takes two minutes, once: what it found is kept.
#
# A guard is another way. `max_js=0.05` lets no step change the model's mind by more than 0.05 nats.

# %%
chosen = StylePrior(TEXT, mode="ratio", λ=0.6 if SHORT else "auto", max_js=0.05, tokenizer=tokenizer, model=model)
print(f"λ = {chosen.lambda_}\n")
print(textwrap.fill(PROMPT + written([chosen]), 100))

# %% [markdown]
# ## Keep it, and open it again
#
# A folder holds the prior with its λ, mode and guards. `push_to_hub("me/my-style")` puts the same on the hub.

# %%
chosen.save_pretrained("my-style")
reopened = StylePrior("my-style")
assert written([reopened]) == written([chosen])
print(*sorted(f"{path.name}: {path.stat().st_size:,} bytes" for path in Path("my-style").iterdir()), sep="\n")

# %% [markdown]
# A `Policy` keeps more in one place: the style, and for instance the temperature.

# %%
Policy(style="my-style", temperature=0.8).save_pretrained("my-policy")
torch.manual_seed(0)
answer = generate(model, PROMPT, tokenizer=tokenizer, policy=Policy.from_pretrained("my-policy"), max_new_tokens=TOKENS)
print(textwrap.fill(PROMPT + answer, 100))

# %% [markdown]
# ## Go on
#
# The command line does the same, with pictures. `texts.png` shows five strengths side by side, with every token
# coloured by how far your text moved it:
#
# ```sh
# decoding sweep --style my.txt --mode ratio --lambda 0:1:0.25
# decoding generate "The captain said" --no-chat --style my-style
# ```

# %% [markdown]
# # A long document on a laptop
#
# Behind a long text, a model looks at all of it again for every token that it writes. Most of it does not matter for
# the next word. Chunk selection reads the text once, in full. From then on it looks at the chunks that matter, and
# chooses them anew whenever a sentence ends.
#
# Run the cells from top to bottom, in VS Code or Jupyter (`jupytext --to ipynb long_document.py`), or run the file as a
# script. It takes a minute and a half on two cores.

# %%
import os
import textwrap
import time

import numpy as np
import torch

from decoding import ChunkAdapters, ChunkSelection, generate
from decoding.models import load_model, load_tokenizer
from decoding.style.source import load_corpus
from experiments.long_context.heat_map import heat_map

TEXT = os.environ.get("LONG_TEXT", "king-james")  # yours: a file or a folder
SHORT = bool(os.environ.get("NOTEBOOK_SHORT"))  # a quick pass through all cells, with a document that is not long
LENGTH, BUDGET, TOKENS, ROUNDS = (400, 150, 12, 1) if SHORT else (6000, 1024, 120, 5)

# %% [markdown]
# ## A document, and something to find in it
#
# The model reads at most 8,192 tokens. We take some 6,000 of the text, put a sentence into it that has nothing to do
# with the rest, and ask for it at the end.

# %%
model, tokenizer = load_model(dtype="float32"), load_tokenizer()
FACT = "\n\nThe name of the ship was Aurora Borealis, and her captain was Mary Whitfield of Nantucket.\n\n"
QUESTION = "\n\nQuestion: What was the name of the ship, and who was her captain?\nAnswer:"


def ids_of(text: str) -> list[int]:
    """Token ids."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


words = ids_of("\n\n".join(load_corpus(TEXT).documents)[: 8 * LENGTH])[:LENGTH]
fact, question, place = ids_of(FACT), ids_of(QUESTION), LENGTH // 4
document = torch.tensor([[*words[:place], *fact, *words[place:]]])
prompt = torch.cat((document, torch.tensor([question])), 1)
print(f"{document.shape[1]:,} tokens; the fact stands at {place:,}, the question at {document.shape[1]:,}")

# %% [markdown]
# ## Read it once
#
# `attach` puts the selection on the model, and takes it off at the end of the block. The document is read with full
# attention. All keys and values are kept in a cache, which later calls go on from.

# %%
selection = ChunkSelection(ChunkAdapters.from_pretrained(), budget=BUDGET)
began = time.perf_counter()
with selection.attach(model, tokenizer) as chunks:
    read = model.generate(
        document,
        attention_mask=torch.ones_like(document),
        max_new_tokens=1,
        do_sample=False,
        return_dict_in_generate=True,
    )
CACHE = chunks.cache_name  # "cache", or "past_key_values" in older transformers
cache = read[CACHE]
cache.crop(document.shape[1])
print(f"read in {time.perf_counter() - began:.0f} seconds")

# %% [markdown]
# ## Ask, in both ways
#
# Without the selection the model looks at everything in the cache. With it, at `BUDGET` tokens.


# %%
def answer(tokens: int = TOKENS) -> list[int]:
    """What the model writes behind the question, greedily. The cache is then as it was."""
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, CACHE: cache}
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    cache.crop(document.shape[1])
    return found[0].tolist()


in_full = answer()
with selection.attach(model, tokenizer, record=True) as chunks:
    selected = answer()
for name, ids in (("full attention", in_full), ("chunk selection", selected)):
    print(f"{name}:", textwrap.fill(tokenizer.decode(ids[prompt.shape[1] :]).strip(), 100), "", sep="\n")

# %% [markdown]
# ## How much was read
#
# Layers do not get the same: those that look up what stands far back get more of the budget.

# %%
held, stats = prompt.shape[1], chunks.stats
print(f"of what the cache holds, {100 * stats['kv_retention']:.0f} % were read, over {stats['steps']} steps")
layers = sorted(stats["layers"].items(), key=lambda item: -item[1])
print("most by layers", ", ".join(f"{layer} ({100 * share:.0f} %)" for layer, share in layers[:4]))
for reading in chunks.readings:
    tokens = reading.kept.sum(1).mean()
    print(f"token {reading.length - held:>4}: {tokens:,.0f} of {reading.length:,} tokens are read, the mean of layers")

# %% [markdown]
# ## What was read
#
# The heat map has the document across, from its first token to its last. The answer is written down the side. Bright is
# what many layers read. The first tokens and the last are always bright. Look at the column of the fact.

# %%
spans = {"the fact": (place, place + len(fact)), "the question": (document.shape[1], held)}
figure = heat_map(chunks.readings, tokenizer, selected, held, spans)
figure.savefig("what_is_read.png", dpi=110)
print("look at what_is_read.png")
figure  # a notebook shows it

# %% [markdown]
# ## How fast
#
# Both ways write behind the same cache, in turns, so that what else the machine does hits both. The longer the
# document, the more it pays: behind 32,768 tokens it is six times as fast as transformers by default.


# %%
def seconds() -> float:
    """Of some tokens."""
    began = time.perf_counter()
    answer(min(TOKENS, 16))
    return time.perf_counter() - began


ratios = []
for _ in range(ROUNDS):
    in_full_seconds = seconds()
    with selection.attach(model, tokenizer):
        ratios.append(in_full_seconds / seconds())
print(f"speed with selection, against full attention: {np.median(ratios):.2f}×; by rounds {np.round(ratios, 2)}")

# %% [markdown]
# ## Where nothing need be dropped, nothing changes
#
# A short prompt is within the budget. The texts are the same, bit for bit.

# %%
alone, attached = (
    generate(model, "The captain said", tokenizer=tokenizer, max_new_tokens=20, logits_processor=processors)
    for processors in ([], [ChunkSelection()])
)
assert alone == attached
print(repr(attached))

# %% [markdown]
# ## Go on
#
# For everyday use one line is enough: `generate(…, logits_processor=[ChunkSelection()])`, or
# `Policy(chunks=2048)`. The heat map of a text of yours:
#
# ```sh
# decoding chunk picture my.txt --out what_is_read.png
# ```

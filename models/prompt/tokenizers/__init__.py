"""Tokenizers. Each takes a vocabulary file, encodes text to ids and decodes ids to text.

No code of the checkpoint runs, and no tokenizer class of transformers is needed. Tokens that the folder's other files
add are one id; those that are special only where a prompt's own frame writes them: `encode_pieces` takes pieces, of
which each SpecialToken is one id and all others are plain text. part_bytes(id) are the bytes of a token that is only a
part of a character, which `decode` cannot show.
"""

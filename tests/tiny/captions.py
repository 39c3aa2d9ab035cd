"""Captions that break a careless tokenizer, template or mask."""

LONG = "a red fox beside a grey wolf, " * 120

CAPTIONS = {
    "plain": "a red fox",
    "empty": "",
    "unicode": "Ein Fuchs läuft über die Straße, cafe\u0301 狐 🦊 \u200d नमस्ते",
    "long": LONG,
    "almost_long": "fox " * 230,
    "special": "</s> a fox <pad> [INST] [/INST] <|im_end|> <|endoftext|> <think> x </think> <|im_start|> end",
    "newlines": "\n\n x\n\nfox\n",
    "image": "[IMG] a fox [IMG]",
    "nested_image": "a [IM[IMG]G] fox",
    "spaces": "   a  red   fox   ",
}

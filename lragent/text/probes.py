"""Short texts that tell tokenizers apart: each normaliser and pre-tokeniser changes the ids of at least one."""

PROBES = (
    "Hello, world! It's 12:30, isn't it?",
    " one space before",
    "  two spaces before",
    "one after ",
    "a  b   c    d",
    "line\nline\n\n\tindented\r\n",
    "UPPER lower CamelCase snake_case",
    "1234567890 3.14 1,000,000 0x1F",
    'def f(x):\n    return {"a": [x ** 2]}  # 100%',
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe",  # composed accents
    "e\u0301a\u0308",  # decomposed accents
    "\ufb01 \uff21 \u2460 \u00bd \u212b \u2026",  # compatibility forms
    "\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u4e2d\u6587",
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u03b5\u03bb\u03bb \u05e2\u05d1\u05e8 \u0639\u0631\u0628",
    "\U0001f600\U0001f468\u200d\U0001f469 \u20ac",
    "non\u00a0breaking\u200bzero\u3000wide \x00\x07 \u2028",
    "\u2581",  # the sign that stands for a space in many vocabularies
    "",
)

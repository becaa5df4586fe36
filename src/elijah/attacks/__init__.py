"""Published attacks, one paper a file. Each is a frozen dataclass called on a clean model."""

from elijah.attacks.baddiffusion import BadDiffusion

ATTACKS = {"baddiffusion": BadDiffusion}

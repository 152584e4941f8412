"""An argparse parser that answers an unknown option with the nearest known one."""

from __future__ import annotations

import argparse
import re
from difflib import get_close_matches
from typing import NoReturn


class HelpfulParser(argparse.ArgumentParser):
    """An argparse parser that answers an unknown option with the nearest known one."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after the message and a suggestion."""
        options = [option for action in self._actions for option in action.option_strings]
        for wrong in re.findall(r"(--[\w-]+)", message.partition("unrecognized arguments:")[2]):
            near = get_close_matches(wrong, options, n=1)
            if near:
                message += f". Did you mean {near[0]}?"
        self.exit(2, f"{self.prog}: {message}\n`{self.prog} --help` lists the options\n")

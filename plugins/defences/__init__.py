"""Defences that fine-tuning selects by name: none, FastClip, and rivals as published."""

from .base import Defence as Defence
from .base import NoDefence as NoDefence
from .fastclip import FastClipComposite as FastClipComposite
from .fastclip import FastClipDefence as FastClipDefence
from .rivals import Bjorck as Bjorck
from .rivals import Delattre as Delattre
from .rivals import Gouk as Gouk
from .rivals import Miyato as Miyato
from .rivals import Senderovich as Senderovich
from .rivals import clip_symbols_ as clip_symbols_
from .rivals import gram_bound as gram_bound

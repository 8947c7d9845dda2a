"""Command line of LRAgent, installed as `lragent_cli`: one file a command, thin over `lragent`.

Modules here import each other relatively, since the folder and the installed package have different names.
"""

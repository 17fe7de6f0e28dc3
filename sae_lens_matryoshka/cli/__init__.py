"""The command ``sae-lens-matryoshka``, one file a command: it parses first, and imports what it runs when it runs."""

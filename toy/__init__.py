"""The miniature's world (world.py), its recipes and what only its training has (training.py, muon.py).

`python -m toy --show out.png` draws it, `python -m toy --write DIR` exports it as LLaVA training data.
"""

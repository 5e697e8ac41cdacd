"""The paper's evidence: each module makes tables or figures of paper/README.md, as `python -m paper.NAME`."""

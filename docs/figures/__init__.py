"""The figures in the pages of `docs`: what turns committed data into tables and sentences' numbers.

A page's block ``[[[cog print(cost.style()) ]]]`` holds what that function returns; ``make figures`` writes all blocks
anew. A number in a sentence with ``<!-- cost.share() -->`` behind it is what that function returns; arguments stand in
the brackets, between semicolons. ``tests/test_published.py`` holds both to the data.

Beside them: `flows` draws the diagrams, and `site` is MkDocs's hook.
"""

"""A page in the browser that chooses, erases, looks, judges and takes away: `expunge studio`.

What the page can do stands in `session`, which knows nothing of browsers; `page` lays it out.
"""

"""A page to try a model on, in a browser: `mrl-redimnet demo`, docs/demo.md.

`listener.Listener` computes what the page shows, `markup` turns it into HTML and pictures, `page` lays it out.
"""

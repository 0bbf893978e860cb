"""The student in a browser: ONNX graphs of a checkpoint, and the page that streams with them.

`export` writes the graphs, `src` is the page. May import everything below the experiments; nothing imports it. It needs the packages in
`requirements.txt` beside it.
"""

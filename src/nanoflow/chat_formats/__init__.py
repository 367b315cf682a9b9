"""How models write tool calls and reasoning into their text: formats as data, and the parser that reads them.

Text comes in, events come out. Nothing here knows of tokens, engines or HTTP: chat templates put tools into a prompt
(`engine/chat_template.py`), and the server makes answers of events (`server/reading.py`).
"""

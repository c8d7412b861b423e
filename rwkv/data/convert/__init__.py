"""Convert text and chats to binidx: sources → inputs (chunks of records) →
schemas/messages/template → encode → pipeline.
"""

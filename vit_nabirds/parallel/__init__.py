"""The processes of a job and their devices: how they meet, agree, stop and end together."""

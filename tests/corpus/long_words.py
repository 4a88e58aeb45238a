"""A judge as a stranger writes it."""

from dataclasses import dataclass

from tryplicity import Judge, Positive, Verdict, hookimpl


class LongWords(Judge):
    """Keeps documents whose words are long enough on the average; the score is that average."""

    name = "long_words"
    cost = 1e-5

    @dataclass(frozen=True)
    class Config:
        least: Positive = 3.0
        """Letters of a word, on the average."""

    def judge(self, documents):
        found = []
        for document in documents:
            words = document.text.split()
            mean = sum(map(len, words)) / max(1, len(words))
            found.append(Verdict(mean, mean >= self.config.least, "short words"))
        return found


@hookimpl
def tryplicity_components():
    return [LongWords]

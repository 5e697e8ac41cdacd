"""What the paper's benchmarks take as right: the metric of one answer, and the number that rows of them make. No torch.

The 13 benchmarks of Section 5.1 and the three with several images of Appendix I.1; which task has which metric is in
paper/tasks.py. Two sets of rules: lmms-eval changed how it reads answers in version 0.7.2 (April 2026), so "classic" is
0.7.1 and earlier, "0.7.2+" is 0.7.3; two things are new in 0.7.3 itself, BLINK's reading and OCRBench's widths of
letters. What is not said to be of one set is in both.

All follow lmms-eval to the letter, and where that is odd it is said; tests/lmms_cases.json holds what its versions
0.7.3 and 0.7.1 themselves say of 200 answers a task. Where it would ask GPT (MMBench), and for MMIU, which it lacks,
the metric says what happens instead.
"""
import re
import string
from statistics import fmean

LETTERS = string.ascii_uppercase
NUMBER_WORDS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}


# --- words and numbers ----------------------------------------------------------------------------------------------
# Each metric is (answer, references, what NEEDS says) -> 0.0 to 1.0, of one question

def bare(text):
    """Small letters without ASCII punctuation; spaces stay as they are."""
    small = text.lower()[:len(text)]            # numpy, with which lmms-eval compares, cuts off what grows ("İ")
    return small.translate({ord(mark): None for mark in string.punctuation})


def exact_match(answer, references):
    """GQA: the same letters and spaces as a reference, whatever the case and the punctuation."""
    return float(bare(answer.strip()) in [bare(x) for x in references])


def number(text):
    """The float that a text is, or None; "5%" is 0.05. Thousands with commas are no numbers here."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(answer, references, tolerance=0.05):
    """ChartQA (arXiv 2203.10244, Section 5.1): within 5% of the number, or the same word, whatever the case.

    Where the reference is 0 no share of it makes sense, and the texts are compared.
    """
    answer = answer.strip()
    given = number(answer)
    for reference in references:
        wanted = number(reference)
        if given is not None and wanted:
            right = abs(given - wanted) / abs(wanted) <= tolerance
        else:
            right = answer.lower() == reference.lower()
        if right:
            return 1.0
    return 0.0


def edit_distance(a, b):
    """Levenshtein: the fewest characters to insert, delete or replace that make one text the other."""
    row = list(range(len(b) + 1))               # row[j]: from the part of a that was read to b[:j]
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(answer, references, threshold=0.5):
    """DocVQA, InfoVQA (arXiv 1907.00490): similarity by edit distance to the nearest reference, 0 below 0.5.

    Odd, and kept: the distance is of texts in small letters with single spaces, its divisor the length of the texts as
    they were, in capitals ("ß" counts 2).
    """
    answer = answer.strip()
    distances = []                              # of each reference, as a share of the longer text
    for reference in references:
        a, b = (" ".join(text.lower().split()) for text in (answer, reference))
        longer = max(len(answer.upper()), len(reference.upper()))
        distances.append(edit_distance(a, b) / longer if longer else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= threshold else 0.0


# The words that the VQA evaluation writes with their apostrophes again, if one of them is missing
APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in APOSTROPHES for i, mark in enumerate(word) if mark == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"        # the one that goes the other way
VQA_WORDS = {**NUMBER_WORDS, "none": "0"}


def vqa_words(text):
    """An answer as the VQA evaluation compares it: small letters, digits for number words, no articles."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    before = text = text.strip().replace("\n", " ").replace("\t", " ")
    for mark in ';/[]"{}()=+\\_->@<`!':         # beside a space it goes, elsewhere it becomes one
        text = text.replace(mark, "" if mark + " " in before or " " + mark in before else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)  # 32 is the flag re.UNICODE, which stands in the place of the count
    words = [VQA_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer, references):
    """TextVQA (arXiv 1505.00468): right in full if 3 of the other annotators said it, the mean over leaving out each of
    the ten."""
    given, said = vqa_words(answer), [vqa_words(reference) for reference in references]
    return fmean(min(1.0, (said.count(given) - (one == given)) / 3) for one in said)  # a match that is left out, less


FORMULAS = "Handwritten Mathematical Expression Recognition"  # OCRBench's question_type of what is from HME100k


def half_width(text):
    """Full-width forms of ASCII as ASCII, and the ideographic space as a space."""
    return "".join(chr(ord(c) - 0xFEE0) if "\uff01" <= c <= "\uff5e" else " " if c == "\u3000" else c for c in text)


def contained(answer, references, category):
    """OCRBench, 0.7.2+: a reference stands in the answer. Formulas whatever the spaces, all else whatever the case and
    the width of letters."""
    if category == FORMULAS:
        texts = [text.strip().replace("\n", "").replace(" ", "") for text in (answer, *references)]
    else:
        texts = [half_width(text).lower().strip().replace("\n", " ") for text in (answer.strip(), *references)]
    return float(any(reference in texts[0] for reference in texts[1:]))


def contained_classic(answer, references, category):
    """OCRBench, classic: widths count, and formulas are looked for in the answer in small letters, so that one with a
    capital in it is never found."""
    answer = answer.lower()
    if category == FORMULAS:
        return contained(answer, references, category)
    return float(any(text.lower().strip().replace("\n", " ") in answer.replace("\n", " ") for text in references))


# --- yes and no -----------------------------------------------------------------------------------------------------

def yes_or_no(answer, references):
    """MME: "yes" or "no" by itself or within the first four characters, or a lone y or n; full stops do not count."""
    text = answer.lower().strip().replace(".", "")
    said = {"y": "yes", "n": "no"}.get(text)
    if said is None:
        start = text[:4]
        said = "yes" if "yes" in start else "no" if "no" in start else ""
    return float(said in [reference.lower().strip().replace(".", "") for reference in references])


def same_word(answer, references):
    """POPE: nothing but the word; "Yes." is wrong."""
    return float(answer.lower().strip() in [reference.lower().strip() for reference in references])


# --- letters of options ---------------------------------------------------------------------------------------------

ANSWER_IS = [article + noun + " is" for article in ("", "the ") for noun in (
    "answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")]
ANSWER_IS += ["i choose", "i select", "i pick", "my answer is", "my choice is",
              "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"]


def find_letter(answer, letters):
    """The option letter that a free answer means, "" if none: lmms-eval's reading from 0.7.2 on.

    The first of these that is found: a lone letter at the start, one at the end, after "the answer is" and the like,
    "(A)", "A.", "A:", "A)", "A ", an A anywhere. Of several found in one way, the one that stands last.
    """
    text = answer.strip()
    for mark in ",.!?;:'\"":                    # in this order, once each
        text = text.strip(mark)
    core, text = text.strip(), f" {text} "
    if not core:
        return ""
    if core[0] in letters and not core[1:2].isalpha():
        return core[0]
    if core[-1] in letters and not core[-2:-1].isalpha():
        return core[-1]

    places = []                                 # (position, letter): of each, the first after a phrase
    for phrase in ANSWER_IS:
        start = text.lower().find(phrase)
        if start >= 0:
            found = [(text.find(letter, start + len(phrase)), letter) for letter in letters]
            places += [place for place in found if place[0] >= 0]
    if places:
        return max(places)[1]

    for form in (r"\(({})\)", r"({})\.", r"({}):", r"({})\)", "({}) ", "({})"):
        found = re.findall(form.format(f"[{letters}]"), text)
        if found:
            return found[-1]
    return ""


def letter(answer, references, letters="ABCD"):
    """MMStar, 0.7.2+: the option that `find_letter` finds."""
    return float(find_letter(answer, letters) in [reference.strip().upper() for reference in references])


def leading_letter(answer, references):
    """MMStar, classic: the answer begins with the letter, perhaps behind one of three openings. Any word does that
    begins with it: "Blue" is B."""
    text = answer.lower().replace("\n", " ").strip()
    openings = [opening + reference.lower().strip() for reference in references
                for opening in ("", "(", "option ", "the answer is ")]
    return float(text.startswith(tuple(openings)))


def letter_or_word(answer, references):
    """RealWorldQA, 0.7.2+: `letter` where a letter is asked for, else the same word, whatever the case."""
    right = [reference.strip() for reference in references]
    if all(x.upper() in tuple("ABCD") for x in right):
        return letter(answer, references)
    return float(answer.lower().strip().rstrip(".") in [x.lower() for x in right])


def option_or_word(answer, references, question):
    """RealWorldQA, classic: an option's text counts as its letter and a number word as its digit; then `exact_match`.

    The answer loses its punctuation first, the options do not, so that those with punctuation are never found.
    """
    answer = NUMBER_WORDS.get(answer.strip().lower(), answer)
    answer = re.sub(r"[^\w\s]", "", answer)
    options = [text.strip() for text in re.findall(r"\b[A-Z]\.\s+([^\n]*)", question)]
    letters = dict(zip(options, LETTERS))       # of two options with one text, the later letter
    found = re.search("|".join(map(re.escape, options)), answer)  # the first in the answer, not the longest
    return exact_match(letters.get(found.group(), answer) if found else answer, references)


def letter_alone(answer, references):
    """ScienceQA: the letter by itself, or a capital with a full stop at the start."""
    text = answer.strip()
    if len(text) >= 2 and text[0].isupper() and text[1] == ".":
        text = text[0]
    return float(text.lower() in [reference.strip().lower() for reference in references])


def before_full_stop(answer):
    """"B. a dog" is B; every other answer stays what it is."""
    found = re.match(r"\s*([A-Z])\.", answer)
    return found.group(1) if found else answer


def letter_exact(answer, references):
    """AI2D: "B. a dog", or B alone with any punctuation around it."""
    return exact_match(before_full_stop(answer), references)


def letter_same(answer, references):
    """MuirBench: "B. a dog", or B alone; "(B)" is wrong."""
    return same_word(before_full_stop(answer), references)


def stated_letter(answer, references, options):
    """BLINK, 0.7.2+ (new in 0.7.3): the letter of an option, in the first of these places: a first line of at most 4
    characters, the last "answer is B", the last "(B)", the start of the answer."""
    text, letters = answer.strip(), f"([{LETTERS[:len(options)]}])"
    first_line = text.split("\n")[0].strip()
    found = re.findall(rf"^\(?{letters}\)?[.\s:,)]*$", first_line, re.I) if len(first_line) <= 4 else []
    found = (found or re.findall(rf"answers?(?:\s+is)?\s*[:-]?\s*\(?{letters}\)?(?![A-Za-z])", text, re.I)
             or re.findall(rf"\({letters}\)", text) or re.findall(rf"^[(\s]*{letters}", text, re.I))
    return float(bool(found) and found[-1].upper() in [reference.strip("()") for reference in references])


def first_letter(answer, references):
    """BLINK, classic: the answer's first letter, of whatever word: "The answer is B" is T."""
    found = re.match(r"[(\s]*([A-Z])", answer, re.I)
    return float(bool(found) and found.group(1).upper() in [reference.strip("()") for reference in references])


def mmbench_letter(answer, options):
    """The option that MMBench's rules find without asking GPT, or "" (arXiv 2307.06281).

    One letter among the words, by itself or with a mark; else the one option whose text stands in the answer.
    """
    words = answer.split()
    for form in "{} {}. {}, {}: {}) {}). ({}) ({}). :{} :{}, :{}. :{}) :{}).".split():
        found = [x for x in "ABCDE" if form.format(x) in words]
        if len(found) == 1 and not (form == "{}" and found == ["A"] and len(words) > 3):  # A may be an article
            return found[0]
    found = [x for x, option in zip(LETTERS, options) if option.lower() in answer.lower()]
    return found[0] if len(found) == 1 else ""


def inferred(answer, references, options):
    """MMBench, classic, but without GPT: lmms-eval asks it where no option is found, and takes one by chance where it
    has no key. Here such an answer is wrong, so that the number is at most lmms-eval's."""
    return float(mmbench_letter(answer, options) in references)


def inferred_or_found(answer, references, options):
    """MMBench, 0.7.2+, as the task mmbench_en_dev_static: `find_letter` in place of GPT."""
    return float((mmbench_letter(answer, options) or find_letter(answer, LETTERS[:len(options)])) in references)


def mmiu_letter(answer, references, options):
    """MMIU (arXiv 2408.02718): a letter without the marks around it; any other answer goes to GPT in the authors' code
    and through `find_letter` here."""
    text = answer.strip().strip(".,()").upper()
    letters = LETTERS[:len(options)]
    found = text if len(text) == 1 and text in letters else find_letter(answer, letters)
    return float(found in [reference.strip() for reference in references])


# What a metric takes of a row beside the references
NEEDS = {contained: ("category",), contained_classic: ("category",), option_or_word: ("question",),
         stated_letter: ("options",), inferred: ("options",), inferred_or_found: ("options",),
         mmiu_letter: ("options",)}


# --- the benchmark's number -----------------------------------------------------------------------------------------
# Each is (rows with "answer" and "score") -> {"score": as the paper's table has it, mostly percent, and what else}

def by(rows, field):
    """{a field's value: the scores of the rows that have it}, in the order of the rows."""
    groups = {}
    for row in rows:
        groups.setdefault(row[field], []).append(row["score"])
    return groups


def mean(rows):
    """Percent of all rows, whatever their category."""
    return {"score": 100 * fmean(row["score"] for row in rows)}


def mean_and_parts(rows):
    """Percent of all rows, and of each category: ChartQA's two parts, OCRBench's ten, MuirBench's tasks."""
    return {**mean(rows), **{category: 100 * fmean(scores) for category, scores in by(rows, "category").items()}}


def macro_mean(rows):
    """MMStar, BLINK, MMIU: the mean of the categories' percentages, each counting as much as any other."""
    parts = mean_and_parts(rows)
    del parts["score"]
    return {"score": fmean(parts.values()), **parts}


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()


def mme_score(rows):
    """MME (arXiv 2306.13394): of each category percent of the questions and percent of the images with both questions
    right, summed: at most 200. Perception has ten categories, cognition four.

    "score" is the paper's, perception / 20: its 60.6 for LLaVA-OneVision is 1212 points.
    """
    points = {"perception": 0.0, "cognition": 0.0}
    for category in by(rows, "category"):
        images = by([row for row in rows if row["category"] == category], "group")
        for image, scores in images.items():
            if len(scores) != 2:
                raise ValueError(f"MME, {category}: {image} has {len(scores)} of its 2 questions; take whole images")
        part = "perception" if category in PERCEPTION else "cognition"
        points[part] += 100 * fmean(fmean(scores) + all(scores) for scores in images.values())
    return {"score": points["perception"] / 20, **points}


def pope_scores(rows):
    """POPE: percent right, which is the paper's; and of finding what is there: precision, recall, F1, in percent.

    An answer that is neither yes nor no is wrong and, as in lmms-eval, missing from the recall.
    """
    pairs = [(row["answers"][0].lower().strip(), row["answer"].lower().strip()) for row in rows]  # (right, said)
    hits = pairs.count(("yes", "yes"))
    precision = 100 * hits / max(1, hits + pairs.count(("no", "yes")))
    recall = 100 * hits / max(1, hits + pairs.count(("yes", "no")))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {**mean(rows), "precision": precision, "recall": recall, "f1": f1}


def circular(rows):
    """MMBench: percent of the questions that are right in every order of their options. Rows of one question share
    their group."""
    return {"score": 100 * fmean(all(scores) for scores in by(rows, "group").values())}

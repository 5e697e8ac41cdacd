"""The signs of the miniature's world, 5 x 5 stitches each: 9 letters, 10 digits, 8 shapes.

No two look alike ("ring" was dropped, it was the digit 0), and no question has the word "a", which is a letter here.
"""
import numpy as np

# One line holds the same row of several signs, each as its name and five stitches
FONT = """
a .###. c .#### e ##### h #...# k #...# l #.... p ####. t ##### x #...#
a #...# c #.... e #.... h #...# k #..#. l #.... p #...# t ..#.. x .#.#.
a ##### c #.... e ####. h ##### k ###.. l #.... p ####. t ..#.. x ..#..
a #...# c #.... e #.... h #...# k #..#. l #.... p #.... t ..#.. x .#.#.
a #...# c .#### e ##### h #...# k #...# l ##### p #.... t ..#.. x #...#
0 .###. 1 ..#.. 2 ####. 3 ####. 4 #..#. 5 ##### 6 .###. 7 ##### 8 .###. 9 .###.
0 #...# 1 .##.. 2 ....# 3 ....# 4 #..#. 5 #.... 6 #.... 7 ....# 8 #...# 9 #...#
0 #...# 1 ..#.. 2 .###. 3 .###. 4 ##### 5 ####. 6 ####. 7 ...#. 8 .###. 9 .####
0 #...# 1 ..#.. 2 #.... 3 ....# 4 ...#. 5 ....# 6 #...# 7 ..#.. 8 #...# 9 ....#
0 .###. 1 .###. 2 ##### 3 ####. 4 ...#. 5 ####. 6 .###. 7 ..#.. 8 .###. 9 .###.
star ..#.. heart .#.#. moon .###. grid .#.#. cross ..#.. box ##### gem ..#.. tree ..#..
star ##### heart ##### moon ..##. grid ##### cross ..#.. box #...# gem .###. tree .###.
star .###. heart ##### moon ...## grid .#.#. cross ##### box #...# gem ##### tree .###.
star ##.## heart .###. moon ..##. grid ##### cross ..#.. box #...# gem .###. tree #####
star #...# heart ..#.. moon .###. grid .#.#. cross ..#.. box ##### gem ..#.. tree ..#..
"""


def read_font(text):
    """{name: (5, 5) booleans}, in the order of the table."""
    rows = {}
    for line in text.splitlines():
        words = line.split()
        for name, stitches in zip(words[::2], words[1::2]):
            rows.setdefault(name, []).append([stitch == "#" for stitch in stitches])
    return {name: np.array(sign) for name, sign in rows.items()}


SIGNS = read_font(FONT)
NAMES = list(SIGNS)
LETTERS, DIGITS, SHAPES = NAMES[:9], NAMES[9:19], NAMES[19:]
FIRST_DIGIT, FIRST_SHAPE, BLANK = 9, 19, len(NAMES)  # a cell holds an index into NAMES, or BLANK

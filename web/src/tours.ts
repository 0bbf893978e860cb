// Guided tours: each a few steps, which set the page, let it play and say what to look at.

import type { Switch } from "./stream";

export interface TourStep {
  text: string;
  at: string; // the element to look at
  compare?: boolean;
  switch?: Switch;
  window?: number;
  sink?: number;
  speed?: number;
  prompt?: string;
  restart?: boolean;
}

export const TOURS: { title: string; steps: TourStep[] }[] = [
  {
    title: "Why errors pile up",
    steps: [
      {
        text: "Block by block the network goes on from frames that it has made itself. In its first training it only ever saw real ones. Left is the student, which Self-Forcing has trained on its own frames.",
        at: "#players", window: 21, sink: 0, speed: 63, prompt: "the digit 3 moving to the right", restart: true,
      },
      {
        text: "Beside it runs the teacher, which is what a network is before Self-Forcing, from the same noise: with guidance, at twice the evaluations, and without. Its first blocks may look fine.",
        at: "#players", compare: true, restart: true,
      },
      {
        text: "Let it run past 100 frames. Without guidance the strokes fade at once. With it small errors enter the cache, the next block starts from them, and strokes fade, blur or change the digit. The student has met its own errors in training and holds.",
        at: "#figures",
      },
    ],
  },
  {
    title: "What a prompt switch does to the cache",
    steps: [
      {
        text: "The coloured line below each cached frame names the prompt whose words are in its keys and values. Now all of them were written under one prompt.",
        at: "#cache", compare: false, window: 21, sink: 0, speed: 12, prompt: "the digit 3 moving to the right", restart: true,
      },
      {
        text: "Keep: the digit is now to be a 7, and the cache stays as it is. Watch the old colour roll out to the left, three frames at a time, while the new blocks already obey.",
        at: "#cache", switch: "keep", prompt: "the digit 7 moving up",
      },
      {
        text: "Recache: back to a 3. The visible frames go through the network once more under the new prompt, so the whole strip changes colour at once. The pictures stay: the video goes on smoothly.",
        at: "#cache", switch: "recache", prompt: "the digit 3 moving down",
      },
      {
        text: "Reset: a 7 again, and the cache is emptied. The new digit is right from its first frame, but the video jumps, since nothing of the past is seen.",
        at: "#cache", switch: "reset", prompt: "the digit 7 moving to the left",
      },
    ],
  },
  {
    title: "What a sink is for",
    steps: [
      {
        text: "A window of 9 frames: a block sees itself and six frames before it. Whatever the digit first looked like soon falls out of the strip.",
        at: "#cache", compare: false, switch: "recache", window: 9, sink: 0, speed: 24, prompt: "the digit 8 moving up and to the right", restart: true,
      },
      {
        text: "Now the first three frames stay for good, framed in the strip: the sink. They are moved right before the frames that remain, so that no two frames are further apart than in training.",
        at: "#cache", sink: 3, restart: true,
      },
      {
        text: "Over hundreds of frames a stream with a sink holds its digit and its strokes better, as every block can still look at the beginning. The price: half of this small window no longer moves. Try other windows and sinks.",
        at: "#controls",
      },
    ],
  },
];

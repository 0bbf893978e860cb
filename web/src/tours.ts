// Guided tours: each a few steps, which set the page and say what to look at.

export interface TourPage {
  say(prompt: string): void;
  set(name: "switch", value: "recache" | "keep" | "reset"): void;
  set(name: "window" | "sink" | "speed", value: number): void;
  compare(isOn: boolean): Promise<void>;
  restart(): void;
  play(isOn: boolean): void;
}

export interface TourStep {
  text: string;
  at: string; // the element to look at
  action(page: TourPage): void | Promise<void>;
}

export const TOURS: { title: string; steps: TourStep[] }[] = [
  {
    title: "Why errors pile up",
    steps: [
      {
        text: "Block by block the network goes on from frames that it has made itself. In its first training it only ever saw real ones. Left is the student, which Self-Forcing has trained on its own frames.",
        at: "#players",
        action(page) {
          page.set("window", 21);
          page.set("sink", 0);
          page.set("speed", 63);
          page.say("the digit 3 moving to the right");
          page.restart();
          page.play(true);
        },
      },
      {
        text: "Beside it runs the same network before Self-Forcing, from the same noise: with guidance, at twice the evaluations, and without. Its first blocks may look fine.",
        at: "#players",
        async action(page) {
          await page.compare(true);
          page.restart();
          page.play(true);
        },
      },
      {
        text: "Let it run past 100 frames. Without guidance the strokes fade at once. With it small errors enter the cache, the next block starts from them, and strokes grow bolder, blur or change the digit. The student has met its own errors in training and holds.",
        at: "#figures",
        action(page) {
          page.play(true);
        },
      },
    ],
  },
  {
    title: "What a prompt switch does to the cache",
    steps: [
      {
        text: "The coloured line below each cached frame names the prompt whose words are in its keys and values. Now all of them were written under one prompt.",
        at: "#cache",
        async action(page) {
          await page.compare(false);
          page.set("window", 21);
          page.set("sink", 0);
          page.set("speed", 12);
          page.say("the digit 3 moving to the right");
          page.restart();
          page.play(true);
        },
      },
      {
        text: "Keep: the digit is now to be a 7, and the cache stays as it is. Watch the old colour roll out to the left, three frames at a time, while the new blocks already obey.",
        at: "#cache",
        action(page) {
          page.set("switch", "keep");
          page.say("the digit 7 moving up");
          page.play(true);
        },
      },
      {
        text: "Recache: back to a 3. The visible frames go through the network once more under the new prompt, so the whole strip changes colour at once. The pictures stay: the video goes on smoothly.",
        at: "#cache",
        action(page) {
          page.set("switch", "recache");
          page.say("the digit 3 moving down");
          page.play(true);
        },
      },
      {
        text: "Reset: a 7 again, and the cache is emptied. The new digit is right from its first frame, but the video jumps, since nothing of the past is seen.",
        at: "#cache",
        action(page) {
          page.set("switch", "reset");
          page.say("the digit 7 moving to the left");
          page.play(true);
        },
      },
    ],
  },
  {
    title: "What a sink is for",
    steps: [
      {
        text: "A window of 9 frames: a block sees itself and six frames before it. Whatever the digit first looked like soon falls out of the strip.",
        at: "#cache",
        async action(page) {
          await page.compare(false);
          page.set("switch", "recache");
          page.set("window", 9);
          page.set("sink", 0);
          page.set("speed", 24);
          page.say("the digit 8 moving up and to the right");
          page.restart();
          page.play(true);
        },
      },
      {
        text: "Now the first three frames stay for good, framed in the strip: the sink. They are moved right before the frames that remain, so that no two frames are further apart than in training.",
        at: "#cache",
        action(page) {
          page.set("sink", 3);
          page.restart();
          page.play(true);
        },
      },
      {
        text: "Over hundreds of frames a stream with a sink holds its digit and its strokes better, as every block can still look at the beginning. The price: half of this small window no longer moves. Try other windows and sinks.",
        at: "#controls",
        action(page) {
          page.play(true);
        },
      },
    ],
  },
];

import { Code } from "@connectrpc/connect";
import { DndError } from "./errors.js";
import type { Job, JobAccepted, JobDone, JobEvent } from "./gen/dnd/v1/job_pb.js";
import type { UnitResult } from "./gen/dnd/v1/result_pb.js";

/** The labelled units of a job. */
export class Dissection {
  /** The job's id: with it `Client.follow` finds all this again. */
  readonly jobId: string;
  /** What the job worked on, and what its results depend on. */
  accepted: JobAccepted | undefined;
  /** How it ended. */
  done: JobDone | undefined;
  /** Pictures that could not be used, and why, by path. */
  readonly skipped = new Map<string, string>();
  readonly #lastEvent: bigint;
  readonly #units = new Map<string, UnitResult>();

  constructor(job: Job) {
    this.jobId = job.jobId;
    this.#lastEvent = job.lastEvent;
  }

  /** Takes what happened in the job; gives whether it has ended. Throws if it waits for someone to resume it. */
  take({ number, event }: JobEvent): boolean {
    // What came before the job was resumed last is its past.
    const isPast = number < this.#lastEvent;
    switch (event.case) {
      case "accepted":
        this.accepted = event.value;
        break;
      case "skipped":
        this.skipped.set(event.value.path, event.value.reason);
        break;
      case "unit":
        this.#units.set(key(event.value.layer, event.value.unit), event.value);
        break;
      case "paused":
        if (!event.value.byItself && !isPast) throw new DndError(Code.FailedPrecondition, event.value.message, event.value.reason);
        break;
      case "done":
        if (isPast) break;
        this.done = event.value;
        return true;
    }
    return false;
  }

  /** The units that have ended, in the order that was asked for. */
  get units(): UnitResult[] {
    const asked = this.accepted?.layers.flatMap(({ layer, units }) => units.map((unit) => this.unit(layer, unit))) ?? [];
    return asked.filter((unit) => unit !== undefined);
  }

  /** The unit of a layer and a number, if it has ended. */
  unit(layer: string, unit: number): UnitResult | undefined {
    return this.#units.get(key(layer, unit));
  }
}

const key = (layer: string, unit: number) => `${unit} ${layer}`;

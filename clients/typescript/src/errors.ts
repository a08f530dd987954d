import { Code, ConnectError } from "@connectrpc/connect";
import { durationMs } from "@bufbuild/protobuf/wkt";
import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

/** A call, or a job, that failed. */
export class DndError extends Error {
  override readonly name = "DndError";

  constructor(
    /** The gRPC status code. */
    readonly code: Code,
    /** What was wrong, and what would be right. */
    message: string,
    /** The stable word that docs/errors.md explains; empty if it was no service of the mesh that answered. */
    readonly reason = "",
    /** The field of the request that can't be right, such as `layers[0].units`; empty if it is none. */
    readonly field = "",
    /** Milliseconds after which the same call is worth another try, if the mesh says so. */
    readonly retryAfterMs?: number,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }

  /** Of whatever a call of a generated client threw. */
  static from(thrown: unknown): DndError {
    if (thrown instanceof DndError) return thrown;
    const error = ConnectError.from(thrown);
    const field = error.findDetails(BadRequestSchema)[0]?.fieldViolations[0]?.field;
    const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
    const reason = error.findDetails(ErrorInfoSchema)[0]?.reason;
    return new DndError(error.code, error.rawMessage, reason, field, delay && durationMs(delay), { cause: thrown });
  }

  /** Whether the mesh was not there, or had no time, and the same call may go well later. */
  get isAway(): boolean {
    const broken = [Code.Unknown, Code.Internal].includes(this.code) && !this.reason;
    const full = this.code === Code.ResourceExhausted && this.retryAfterMs !== undefined;
    return broken || full || this.code === Code.Unavailable;
  }
}

/** How long a call waits for a mesh that is away: about a minute, after each answer anew. */
export class Patience {
  #tries = 12;
  #after = 250;

  /** Milliseconds until the next try. Throws the error if there is to be none. */
  wait(error: DndError): number {
    if (!error.isAway || this.#tries === 0) throw error;
    this.#tries -= 1;
    // No two callers wait equally long, so that they do not come back as one.
    const delay = Math.max(this.#after, Math.min(error.retryAfterMs ?? 0, 60_000)) * (1 + Math.random() / 2);
    this.#after = Math.min(2 * this.#after, 8_000);
    return delay;
  }
}

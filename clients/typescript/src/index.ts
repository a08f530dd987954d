/** Labels the neurons of vision networks in words: a client of Describe-and-Dissect. The generated messages and services are in `describe-and-dissect/v1/*`. */
export { Client, type Connection, type Following } from "./client.js";
export { Dissection } from "./dissection.js";
export { DndError } from "./errors.js";
